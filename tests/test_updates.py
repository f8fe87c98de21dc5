"""How flags are written, and that each changes in a training what it names."""

import functools

import numpy as np
import pytest
import torch
from conftest import scalars

import ppo

# Four updates of six gradient steps, and gradients that are not clipped
SMALL = (
    "--total-timesteps 256 --num-envs 4 --num-steps 16 --num-minibatches 2 "
    "--update-epochs 3 --max-grad-norm 1000 "
)


class Recorder(ppo.Agent):
    """Keeps what it plays and learns from, and its parameters and gradients."""

    def __init__(self, envs):
        super().__init__(envs)
        self.played = []  # in each step of the rollout: observations and actions
        self.learned_from = []  # the same in each minibatch
        self.before = []  # all parameters before each gradient step, as one vector
        self.gradients = []  # of each gradient step, {name: numbers}
        for name, parameter in self.named_parameters():
            parameter.register_hook(functools.partial(self.keep_gradient, name))

    def get_action(self, obs):
        action, logprob = super().get_action(obs)
        self.played.append(torch.cat([obs, action[:, None]], dim=1))
        return action, logprob

    def evaluate_actions(self, obs, action):
        self.learned_from.append(torch.cat([obs, action[:, None]], dim=1))
        self.before.append(self.vector())
        self.gradients.append({})
        return super().evaluate_actions(obs, action)

    def keep_gradient(self, name, gradient):
        self.gradients[-1][name] = gradient.clone()

    def vector(self):
        return torch.nn.utils.parameters_to_vector(self.parameters()).detach().clone()

    def gradient(self, step):
        parts = [self.gradients[step][name] for name, _ in self.named_parameters()]
        return torch.nn.utils.parameters_to_vector(parts)


def learning_rates(folder):
    return [rate for _, rate in scalars(folder)["charts/learning_rate"]]


def test_every_step_that_was_played_is_learned_from_once_per_epoch(run):
    agent = run(SMALL, Agent=Recorder).agent
    played = torch.cat(agent.played).view(4, 64, 5)
    learned_from = torch.cat(agent.learned_from).view(4, 3, 64, 5)
    for rollout, epochs in zip(played.tolist(), learned_from.tolist(), strict=True):
        assert all(sorted(epoch) == sorted(rollout) for epoch in epochs)


def test_the_policy_that_learns_first_is_the_one_that_played(run):
    """So the ratio is 1. Batches of another size may round otherwise."""
    flags = "--total-timesteps 1536 --num-minibatches 1 "
    flags += "--no-anneal-lr --learning-rate 0.01 "
    in_first_epoch = scalars(run(flags + "--update-epochs 1").folder)
    in_second_epoch = scalars(run(flags + "--update-epochs 2").folder)
    assert all(abs(kl) < 1e-6 for _, kl in in_first_epoch["losses/approx_kl"])
    assert all(kl > 1e-5 for _, kl in in_second_epoch["losses/approx_kl"])


def test_the_learning_rate_falls_in_a_straight_line_towards_0(run):
    rates = learning_rates(run(SMALL + "--learning-rate 0.001").folder)
    assert rates == pytest.approx([0.001, 0.00075, 0.0005, 0.00025])

    rates = learning_rates(run(SMALL + "--learning-rate 0.001 --no-anneal-lr").folder)
    assert rates == pytest.approx([0.001] * 4)


def test_steps_are_those_of_adam_with_eps_1e_minus_5(run):
    result = run(SMALL, Agent=Recorder)
    rates = np.repeat(learning_rates(result.folder), 6)
    agent = result.agent
    parameters = [*agent.before, agent.vector()]
    m = 0
    v = 0
    for step, rate in enumerate(rates):
        gradient = agent.gradient(step)
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        m_hat = m / (1 - 0.9 ** (step + 1))
        v_hat = v / (1 - 0.999 ** (step + 1))
        expected = parameters[step] - rate * m_hat / (v_hat.sqrt() + 1e-5)
        torch.testing.assert_close(parameters[step + 1], expected, rtol=0, atol=3e-7)


@pytest.fixture
def first_step(run):
    """first_step(flags) shows a training of one update, up to its first gradient step.

    Only the number of steps is that of the whole training.
    """

    def first_step(flags):
        shape = "--total-timesteps 128 --num-steps 32 --num-minibatches 2 "
        epochs = "--update-epochs 3 --max-grad-norm 1000 "
        result = run(shape + epochs + flags, Agent=Recorder)
        agent = result.agent
        return {
            "played": torch.cat(agent.played[:32]).tolist(),
            "minibatch": agent.learned_from[0].tolist(),
            "rate": learning_rates(result.folder)[0],
            "gradient": agent.gradient(0).tolist(),
            "step": (agent.before[1] - agent.before[0]).tolist(),
            "number of steps": len(agent.learned_from),
        }

    return first_step


@pytest.mark.parametrize(
    "flag, changed",
    [
        ("--seed 2", {"played", "minibatch", "gradient", "step"}),
        ("--total-timesteps 256", {"number of steps"}),
        ("--gamma 0.9", {"gradient", "step"}),
        ("--gae-lambda 0.5", {"gradient", "step"}),
        ("--no-gae", {"gradient", "step"}),
        ("--learning-rate 0.001", {"rate", "step"}),
        ("--update-epochs 2", {"number of steps"}),
        ("--num-minibatches 4", {"minibatch", "gradient", "step", "number of steps"}),
        ("--no-norm-adv", {"gradient", "step"}),
        ("--ent-coef 0.5", {"gradient", "step"}),
        ("--vf-coef 0.1", {"gradient", "step"}),
        ("--max-grad-norm 0.01", {"step"}),
        # These act later, or not on this run.
        ("--no-anneal-lr", set()),
        ("--clip-coef 0.0001", set()),
        ("--no-clip-vloss", set()),
        ("--target-kl 1000", set()),
        ("--bootstrap-truncation", set()),
        ("--checkpoint-interval 0", set()),
        ("--no-torch-deterministic", set()),
        ("--no-cuda", set()),
        ("--exp-name other", set()),
    ],
)
def test_a_flag_changes_what_it_names_and_nothing_else(flag, changed, first_step):
    before = first_step("")
    after = first_step(flag)
    assert {key for key in before if before[key] != after[key]} == changed


@pytest.mark.parametrize(
    "flag",
    ["--clip-coef 0.01", "--no-clip-vloss", "--no-anneal-lr", "--target-kl 0.0001"],
)
def test_a_flag_that_acts_later_changes_the_outcome(flag, run):
    flags = SMALL + "--learning-rate 0.01 "
    before = run(flags, Agent=Recorder).agent
    after = run(flags + flag, Agent=Recorder).agent
    assert not before.vector().equal(after.vector())


@pytest.mark.parametrize(
    "flags, name, value",
    [
        ("--gae", "gae", True),
        ("--gae True", "gae", True),
        ("--gae=TRUE", "gae", True),
        ("--no-gae", "gae", False),
        ("--no_gae", "gae", False),
        ("--gae False", "gae", False),
        ("--gae=false", "gae", False),
        ("--gae False --gae", "gae", True),
        ("--track", "track", True),
        ("--track=false", "track", False),
        ("--bootstrap_truncation true", "bootstrap_truncation", True),
        ("--learning_rate=0.1", "learning_rate", 0.1),
        ("--learning-rate 1e-3", "learning_rate", 0.001),
        ("--total-timesteps 1e6", "total_timesteps", 1_000_000),
        ("--total_timesteps 2048", "total_timesteps", 2048),
        ("--target-kl 0.015", "target_kl", 0.015),
        ("--target-kl 0.015 --target-kl None", "target_kl", None),
        ("--wandb-entity None", "wandb_entity", None),
        ("--wandb-entity a_b", "wandb_entity", "a_b"),
        ("--exp-name=a_b=c", "exp_name", "a_b=c"),
        ("--gym-id Acrobot-v1", "env_id", "Acrobot-v1"),
    ],
)
def test_flags_can_be_spelled_in_several_ways(flags, name, value):
    found = getattr(ppo.parse_args(flags.split()), name)
    assert found == value
    assert type(found) is type(value)


def test_defaults_are_as_documented_and_sizes_follow_from_them():
    expected = {
        "exp_name": "ppo",
        "env_id": "CartPole-v1",
        "total_timesteps": 25000,
        "seed": 1,
        "torch_deterministic": True,
        "cuda": True,
        "num_threads": 1,
        "track": False,
        "wandb_project_name": "cleanrl",
        "wandb_entity": None,
        "capture_video": False,
        "checkpoint_interval": 60,
        "resume": None,
        "num_envs": 4,
        "vectorization_mode": "sync",
        "num_steps": 128,
        "gamma": 0.99,
        "gae": True,
        "gae_lambda": 0.95,
        "bootstrap_truncation": False,
        "learning_rate": 2.5e-4,
        "anneal_lr": True,
        "update_epochs": 4,
        "num_minibatches": 4,
        "norm_adv": True,
        "clip_coef": 0.2,
        "clip_vloss": True,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
        "target_kl": None,
        "world_size": 1,
        "rank": 0,
        "local_num_envs": 4,
        "batch_size": 512,
        "minibatch_size": 128,
        "num_updates": 48,
    }
    args = vars(ppo.parse_args([]))
    assert {name: args[name] for name in expected} == expected


def test_a_variants_defaults_give_way_to_flags():
    assert ppo.parse_args([], gamma=0.5).gamma == 0.5
    assert ppo.parse_args(["--gamma", "0.9"], gamma=0.5).gamma == 0.9
