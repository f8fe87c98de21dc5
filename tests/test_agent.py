"""The agent starts as detail 2 says, and acts as its distribution does."""

import math
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

import ppo


def make_agent(obs_dim, num_actions, seed=0):
    torch.manual_seed(seed)
    envs = SimpleNamespace(
        single_observation_space=gym.spaces.Box(-1, 1, (obs_dim,)),
        single_action_space=gym.spaces.Discrete(num_actions),
    )
    return ppo.Agent(envs)


@pytest.mark.parametrize("inputs, outputs", [(4, 64), (64, 64), (64, 3)])
def test_layer_init_gives_orthogonal_weights_and_constant_biases(inputs, outputs):
    layer = ppo.layer_init(nn.Linear(inputs, outputs), std=0.7, bias_const=0.5)
    weight = layer.weight.detach()
    shorter = weight if outputs <= inputs else weight.T
    products = shorter @ shorter.T
    expected = 0.7**2 * torch.eye(len(shorter))
    torch.testing.assert_close(products, expected, atol=1e-5, rtol=1e-5)
    assert (layer.bias == 0.5).all()


@pytest.mark.parametrize("name, outputs, gain", [("critic", 1, 1), ("actor", 3, 0.01)])
def test_networks_have_the_stated_layers_and_gains(name, outputs, gain):
    network = getattr(make_agent(obs_dim=6, num_actions=3), name)
    kinds = [type(layer) for layer in network]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]

    shapes = [(64, 6), (64, 64), (outputs, 64)]
    gains = [math.sqrt(2), math.sqrt(2), gain]
    for linear, shape, expected in zip(network[::2], shapes, gains, strict=True):
        assert linear.weight.shape == shape
        stretches = torch.linalg.svdvals(linear.weight.detach())
        torch.testing.assert_close(stretches, torch.full_like(stretches, expected))
        assert (linear.bias == 0).all()


def test_the_critic_is_initialized_before_the_actor():
    """The order of random draws is a part of the exactness."""
    agent = make_agent(obs_dim=4, num_actions=2, seed=3)
    torch.manual_seed(3)
    first = ppo.layer_init(nn.Linear(4, 64))
    assert first.weight.equal(agent.critic[0].weight)


def test_at_first_all_actions_are_about_equally_likely():
    agent = make_agent(obs_dim=4, num_actions=5)
    policy = agent.get_policy(torch.randn(1000, 4))
    expected = torch.full((1000, 5), 1 / 5)
    torch.testing.assert_close(policy.probs, expected, atol=0.01, rtol=0)


def test_actions_logprobs_and_entropies_equal_those_of_categorical():
    agent = make_agent(obs_dim=4, num_actions=5)
    for parameter in agent.actor.parameters():  # away from equal probabilities
        parameter.data += 0.3 * torch.randn_like(parameter)
    obs = torch.randn(500, 4)
    policy = Categorical(logits=agent.actor(obs))

    torch.manual_seed(7)
    expected = policy.sample()
    torch.manual_seed(7)
    action, logprob = agent.get_action(obs)
    assert action.equal(expected)
    assert action.unique().tolist() == [0, 1, 2, 3, 4]
    assert logprob.equal(policy.log_prob(action))

    given = torch.randint(5, (500,))
    logprob, entropy, value = agent.evaluate_actions(obs, given)
    assert logprob.equal(policy.log_prob(given))
    assert entropy.equal(policy.entropy())
    assert value.equal(agent.critic(obs).flatten())
    assert value.equal(agent.get_value(obs))


class Deeper(ppo.Agent):
    """Has a third hidden layer, a hook, and parameters that were loaded."""

    def __init__(self, envs):
        super().__init__(envs)
        self.actor.insert(4, nn.ReLU())
        self.actor.insert(4, ppo.layer_init(nn.Linear(64, 64)))
        self.batches = []
        self.actor.register_forward_hook(self.keep)

        self.start = {name: x.clone() for name, x in self.state_dict().items()}
        self.start["actor.6.bias"] = torch.tensor([5.0, 0.0])
        self.load_state_dict(self.start)

    def keep(self, module, inputs, logits):
        self.batches.append(len(logits))


def test_an_agent_of_ones_own_is_trained_as_it_is(run):
    result = run("--total-timesteps 512 --num-steps 32", Agent=Deeper)
    agent = result.agent
    one_rollout_and_update = [4] * 32 + [32] * 16
    assert agent.batches == 4 * one_rollout_and_update

    # The loaded bias always pushes to the left, where the pole falls soon.
    assert max(length for _, _, length in result.episodes) < 12
    for name, parameter in agent.named_parameters():
        assert not parameter.equal(agent.start[name]), name
