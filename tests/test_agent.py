"""The agent starts as detail 2 says, its distribution is that of torch.distributions, and what replaces it counts."""

import math
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch

import ppo


def envs_of(obs_dim, num_actions):
    """All that an agent needs to know of its environments."""
    box, discrete = gym.spaces.Box(-1, 1, (obs_dim,)), gym.spaces.Discrete(num_actions)
    return SimpleNamespace(single_observation_space=box, single_action_space=discrete)


@pytest.mark.parametrize(
    "in_features, out_features, gain", [(4, 64, math.sqrt(2)), (64, 64, math.sqrt(2)), (64, 3, 0.01)]
)
def test_layer_init_gives_orthogonal_weights_of_the_gain_and_constant_biases(in_features, out_features, gain):
    layer = ppo.layer_init(torch.nn.Linear(in_features, out_features), gain, bias_const=0.5)
    weight = layer.weight if out_features <= in_features else layer.weight.T  # the shorter side is the orthogonal one
    torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-4, rtol=1e-4)
    assert (layer.bias == 0.5).all()


def test_networks_have_the_stated_shape_gains_and_zero_biases():
    agent = ppo.Agent(envs_of(6, 3))
    for network, out_features, last_gain in ((agent.critic, 1, 1.0), (agent.actor, 3, 0.01)):
        first, tanh, second, tanh2, last = network
        assert (
            isinstance(network, torch.nn.Sequential) and isinstance(tanh, torch.nn.Tanh) and type(tanh2) is type(tanh)
        )
        assert [tuple(m.weight.shape) for m in (first, second, last)] == [(64, 6), (64, 64), (out_features, 64)]
        for linear, gain in ((first, math.sqrt(2)), (second, math.sqrt(2)), (last, last_gain)):
            largest = torch.linalg.matrix_norm(linear.weight.detach(), ord=2)
            assert float(largest) == pytest.approx(gain, rel=1e-4)
            assert (linear.bias == 0).all()


def test_critic_is_initialized_before_the_actor():
    """The order of random draws is part of the exactness rules."""
    torch.manual_seed(3)
    agent = ppo.Agent(envs_of(4, 2))
    torch.manual_seed(3)
    first = ppo.layer_init(torch.nn.Linear(4, 64))
    assert first.weight.equal(agent.critic[0].weight)


def test_policy_starts_near_uniform():
    torch.manual_seed(0)
    _, logprob, entropy, _ = ppo.Agent(envs_of(4, 5)).get_action_and_value(torch.randn(1000, 4))
    assert (entropy > math.log(5) - 1e-3).all()
    torch.testing.assert_close(logprob, torch.full((1000,), -math.log(5)), atol=0.05, rtol=0)


def test_actions_logprobs_and_entropy_equal_categorical_to_the_bit():
    torch.manual_seed(0)
    agent = ppo.Agent(envs_of(4, 5))
    for p in agent.actor.parameters():  # away from uniform
        p.data += 0.3 * torch.randn_like(p)
    obs = torch.randn(500, 4)
    policy = torch.distributions.Categorical(logits=agent.actor(obs))
    torch.manual_seed(7)
    expected_action = policy.sample()
    torch.manual_seed(7)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    assert action.equal(expected_action) and action.unique().tolist() == [0, 1, 2, 3, 4]
    assert logprob.equal(policy.log_prob(action))
    assert entropy.equal(policy.entropy())
    assert value.shape == (500,) and value.equal(agent.get_value(obs))
    given = torch.randint(5, (500,))
    assert agent.get_action_and_value(obs, given)[1].equal(policy.log_prob(given))


class Deeper(ppo.Agent):
    """A third hidden layer, a hook, and parameters that load_state_dict has put in the place of others."""

    def __init__(self, envs):
        super().__init__(envs)
        self.actor.insert(4, torch.nn.ReLU())
        self.actor.insert(4, ppo.layer_init(torch.nn.Linear(64, 64)))
        self.seen = []
        self.actor[5].register_forward_hook(lambda module, inputs, output: self.seen.append(output.shape))
        self.start = {name: p + 100 * (name == "critic.4.bias") for name, p in self.state_dict().items()}
        self.load_state_dict({name: p.clone() for name, p in self.start.items()}, assign=True)


class SGD(torch.optim.SGD):
    def __init__(self, params, lr, eps, fused):
        super().__init__(params, lr)


def test_a_third_layer_a_hook_an_assigned_state_and_another_optimizer_take_effect(run, monkeypatch):
    values, compute_advantages = [], ppo.compute_advantages
    monkeypatch.setattr(ppo, "compute_advantages", lambda *args: values.append(args[1]) or compute_advantages(*args))
    monkeypatch.setattr(torch.optim, "Adam", SGD)
    agent = run("--total-timesteps 512 --no-anneal-lr --learning-rate 0.001", Agent=Deeper).agent
    assert agent.seen == [(4, 64)] * 128 + [(128, 64)] * 16  # each step of the rollout, then each minibatch
    assert abs(values[0] - 100).max() < 20
    moved = [(p - q).norm() for p, q in zip(agent.parameters(), agent.start.values(), strict=True)]
    assert min(moved) > 0 and max(moved) <= 16 * 0.001 * 0.5  # SGD goes no further: steps of the clipped norm
