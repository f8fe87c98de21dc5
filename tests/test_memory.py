"""ppo_memory.py: its LSTM, what it forgets, and the way of its state."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_results, parse_episodes
from environments import MODES, Counting, register

import evaluate
import ppo
from ppo_memory import DEFAULTS, STATE_SIZE, Agent, make_envs
from tests.reference import plain_memory

SHORT = "--total-timesteps 1024 --update-epochs 2"


@pytest.fixture
def train(run):
    """train(flags) trains as the program does, in this process; see run."""
    return functools.partial(run, make_envs=make_envs, Agent=Agent, **DEFAULTS)


def environments(flags=""):
    args = ppo.parse_args(flags.split(), **DEFAULTS)
    return make_envs(args, args.seed)


@pytest.fixture
def agent():
    """An agent that remembers two numbers, with weights that make a difference."""
    torch.manual_seed(1)
    agent = Agent(environments())
    torch.nn.init.orthogonal_(agent.actor.weight)
    return agent


def random_obs(steps, batch, begins):
    """Observations with a random state; begins: {(step, index of the batch), ...}"""
    torch.manual_seed(2)
    obs = torch.randn(steps, batch, 2 + STATE_SIZE + 1)
    obs[..., -1] = 0
    for step, index in begins:
        obs[step, index, -1] = 1
    return obs


# The five details


def test_weights_of_the_lstm_are_orthogonal_and_its_biases_are_zero(agent):
    for name, parameter in agent.lstm.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        else:
            assert (parameter.T @ parameter).allclose(torch.eye(64), atol=1e-5)


def test_the_state_is_zero_at_first_and_after_the_end_of_an_episode_it_is_ignored(
    agent,
):
    obs = random_obs(1, 3, begins={(0, 1)})
    without_state = obs.clone()
    without_state[:, 1, 2:-1] = 0
    hidden, state = agent.remember(obs)
    same_hidden, same_state = agent.remember(without_state)
    assert hidden.equal(same_hidden)
    assert state.equal(same_state)

    without_state[:, 0, 2:-1] = 0  # here no episode begins
    other_hidden, _ = agent.remember(without_state)
    assert not hidden.equal(other_hidden)

    next_obs, _ = environments().reset(seed=1)
    assert not next_obs[:, 2:-1].any()
    assert next_obs[:, -1].all()


def test_an_episode_leaves_no_trace_in_the_next_one(agent):
    obs = random_obs(9, 2, begins={(4, 0)})
    changed = obs.clone()
    changed[:4, 0, :2] += 1
    before, _ = agent.remember(obs)
    after, _ = agent.remember(changed)
    assert not before[:4, 0].equal(after[:4, 0])
    assert before[4:, 0].equal(after[4:, 0])
    assert before[:, 1].equal(after[:, 1])


def test_whole_sequences_give_what_single_steps_give(agent):
    obs = random_obs(12, 4, begins={(0, 2), (3, 0), (3, 1), (4, 1), (11, 3)})
    whole, last_state = agent.remember(obs)
    state = obs[0, :, 2:-1]
    for step in range(12):
        one = obs[step : step + 1].clone()
        one[0, :, 2:-1] = state
        hidden, state = agent.remember(one)
        assert hidden[0].allclose(whole[step], atol=1e-6)
    assert state.allclose(last_state, atol=1e-6)


def test_a_minibatch_holds_whole_environments(train):
    shapes = set()

    class Watching(Agent):
        def evaluate_actions(self, obs, action):
            # The state after a step is that before the next one of the environment.
            continues = obs[1:, :, -1] == 0
            assert action[:-1, :, 1:][continues].equal(obs[1:, :, 2:-1][continues])
            shapes.add(tuple(obs.shape))
            return super().evaluate_actions(obs, action)

    train("--total-timesteps 256 --num-minibatches 4", Agent=Watching)
    assert shapes == {(32, 2, 2 + STATE_SIZE + 1)}


def test_the_gradient_flows_back_to_the_first_step(agent):
    obs = random_obs(6, 1, begins=set()).requires_grad_()
    agent.evaluate_actions(obs, torch.zeros(6, 1, 1 + STATE_SIZE))[2][-1].backward()
    assert obs.grad[0].any()
    assert not obs.grad[1:, :, 2:-1].any()  # later states are computed anew


# The whole program


@pytest.mark.parametrize(
    "flags",
    [
        "--update-epochs 4 --total-timesteps 2048",
        "--seed 2 --num-minibatches 4 --num-envs 4 --num-steps 64 --update-epochs 2 "
        "--total-timesteps 2048",
        pytest.param("--seed 5 --total-timesteps 8192", marks=pytest.mark.slow),
        "--seed 3 --bootstrap-truncation --env-id environments:TimeLimit5-v0 "
        "--update-epochs 2 --total-timesteps 1024",
        "--seed 4 --no-norm-adv --ent-coef 0.01 --target-kl 0.01 --env-id CartPole-v1 "
        "--update-epochs 4 --total-timesteps 1024",
    ],
)
def test_every_episode_and_parameter_equals_that_of_the_plain_program(
    flags, train, capsys
):
    result = train(flags)
    plain = plain_memory.train(ppo.parse_args(flags.split(), **DEFAULTS))
    assert result.episodes == parse_episodes(capsys.readouterr().out) != []
    pairs = zip(result.agent.parameters(), plain.parameters(), strict=True)
    for parameter, expected in pairs:
        assert parameter.equal(expected)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_killed_run_goes_on_with_the_state_it_had(mode, train, crash):
    flags = f"{SHORT} --vectorization-mode {mode} --checkpoint-interval 1e-9"
    folder = crash(flags, update=3, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    resumed = train(f"--resume {folder}")
    if mode == "sync":
        whole = train(flags)
        assert_same_results(resumed, whole, after_step=512)
    else:  # new episodes begin, with a state of zeros
        assert resumed.episodes


def test_it_is_watched_with_its_memory(train):
    folder = train(SHORT).folder
    for flags in ([], ["--deterministic"]):
        returns = evaluate.main([str(folder), "--episodes", "2", *flags])
        assert len(returns) == 2


def test_what_does_not_suit_a_memory_is_one_line(fails):
    main = functools.partial(ppo.main, make_envs=make_envs, Agent=Agent, **DEFAULTS)
    _, line = fails("--num-minibatches 3 --num-steps 30", main=main)
    assert "3 must divide the 8 environments" in line
    assert MODES["Counting"] == gym.vector.AutoresetMode.NEXT_STEP
    batch = "--env-id environments:Counting-v0 --vectorization-mode vector_entry_point"
    _, line = fails(batch, main=main)
    assert "resets in the next step" in line


class OneArray(Counting):
    """Gives the last observations as one array, with zeros where no episode ended."""

    def __init__(self, num_envs):
        super().__init__(num_envs, gym.vector.AutoresetMode.SAME_STEP)

    def step(self, actions):
        obs, *others, infos = super().step(actions)
        final_obs = np.zeros_like(obs)
        for i in np.flatnonzero(infos["_final_obs"]):
            final_obs[i] = infos["final_obs"][i]
        infos["final_obs"] = final_obs
        return obs, *others, infos


def test_last_observations_may_be_one_array(train):
    flags = (
        f"{SHORT} --vectorization-mode vector_entry_point --bootstrap-truncation "
        "--env-id "
    )
    register(None, vector_entry_point=OneArray)
    one = train(flags + "Odd-v0").agent
    other = train(flags + "CountingSameStep-v0").agent
    for parameter, expected in zip(one.parameters(), other.parameters(), strict=True):
        assert parameter.equal(expected)


@pytest.mark.slow
def test_it_learns_what_cannot_be_learned_without_a_memory(train, run):
    with_memory = train("--total-timesteps 50000")
    settings = {**DEFAULTS, "env_id": "CartPoleWithoutVelocities-v0"}
    without = run("--total-timesteps 20000", **settings)  # more does not help it
    last = [episodic_return for _, episodic_return, _ in with_memory.episodes[-50:]]
    others = [episodic_return for _, episodic_return, _ in without.episodes[-50:]]
    assert np.mean(last) > 120
    assert np.mean(others) < 80
