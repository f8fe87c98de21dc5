"""The agent starts as detail 2 says, and its distribution is that of torch.distributions."""

import math

import pytest
import torch

import ppo


@pytest.mark.parametrize(
    "in_features, out_features, gain", [(4, 64, math.sqrt(2)), (64, 64, math.sqrt(2)), (64, 3, 0.01)]
)
def test_layer_init_gives_orthogonal_weights_of_the_gain_and_constant_biases(in_features, out_features, gain):
    layer = ppo.layer_init(torch.nn.Linear(in_features, out_features), gain, bias=0.5)
    weight = layer.weight if out_features <= in_features else layer.weight.T  # the shorter side is the orthogonal one
    torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-4, rtol=1e-4)
    assert (layer.bias == 0.5).all()


def test_networks_have_the_stated_shape_gains_and_zero_biases():
    agent = ppo.Agent(6, 3)
    for network, out_features, last_gain in ((agent.critic, 1, 1.0), (agent.actor, 3, 0.01)):
        assert [tuple(m.weight.shape) for m in network] == [(64, 6), (64, 64), (out_features, 64)]
        for linear, gain in zip(network, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
            largest = torch.linalg.matrix_norm(linear.weight.detach(), ord=2)
            assert float(largest) == pytest.approx(gain, rel=1e-4)
            assert (linear.bias == 0).all()


def test_the_network_computes_what_nn_sequential_would_to_the_bit():
    network = ppo.MLP(4, 3, gain=1.0)
    first, second, last = network
    sequential = torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Tanh(), last)
    x = torch.randn(128, 4)
    assert network(x).equal(sequential(x))


def test_critic_is_initialized_before_the_actor():
    """The order of random draws is part of the exactness rules."""
    torch.manual_seed(3)
    agent = ppo.Agent(4, 2)
    torch.manual_seed(3)
    first = ppo.layer_init(torch.nn.Linear(4, 64))
    assert first.weight.equal(agent.critic[0].weight)


def test_policy_starts_near_uniform():
    torch.manual_seed(0)
    agent = ppo.Agent(4, 5)
    _, logprob, entropy, _ = agent.get_action_and_value(torch.randn(1000, 4))
    assert (entropy > math.log(5) - 1e-3).all()
    torch.testing.assert_close(logprob, torch.full((1000,), -math.log(5)), atol=0.05, rtol=0)


def test_actions_logprobs_and_entropy_equal_categorical_to_the_bit():
    torch.manual_seed(0)
    agent = ppo.Agent(4, 5)
    for p in agent.actor.parameters():  # away from uniform
        p.data += 0.3 * torch.randn_like(p)
    obs = torch.randn(500, 4)
    policy = torch.distributions.Categorical(logits=agent.actor(obs))
    torch.manual_seed(7)
    expected_action = policy.sample()
    torch.manual_seed(7)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    torch.manual_seed(7)
    assert all(a.equal(b) for a, b in zip(agent.get_action(obs), (action, logprob), strict=True))
    assert action.equal(expected_action) and action.unique().tolist() == [0, 1, 2, 3, 4]
    assert logprob.equal(policy.log_prob(action))
    assert entropy.equal(policy.entropy())
    assert value.shape == (500,) and value.equal(agent.get_value(obs))
    given = torch.randint(5, (500,))
    assert agent.get_action_and_value(obs, given)[1].equal(policy.log_prob(given))
