"""What the training loop does with each flag, seen from outside by watching the functions that it calls."""

import numpy as np
import pytest
import torch
from conftest import scalars

import ppo

SMALL = (
    "--total-timesteps 256 --num-envs 4 --num-steps 16 --num-minibatches 2 --update-epochs 3"  # 4 updates of 6 steps
)


@pytest.fixture
def trace(run, monkeypatch):
    """trace(flags) trains and returns what went through the algorithm in each rollout and minibatch."""

    def trace(flags):
        keys = "rollouts advantages explained minibatches lr before grads after grad_norm ratio loss stats"
        seen = {key: [] for key in keys.split()}
        compute_advantages, ppo_loss, flat = ppo.compute_advantages, ppo.ppo_loss, torch.nn.utils.parameters_to_vector

        class SpiedAgent(ppo.Agent):
            def get_action_and_value(self, obs, action=None):
                if action is not None:
                    seen["minibatches"].append(torch.cat([obs, action[:, None].float()], 1))
                return super().get_action_and_value(obs, action)

        class SpiedAdam(torch.optim.Adam):
            def step(self):
                (group,) = self.param_groups
                seen["lr"].append(group["lr"])
                seen["before"].append(flat(group["params"]).detach())
                seen["grads"].append(flat([p.grad for p in group["params"]]))
                seen["grad_norm"].append(float(seen["grads"][-1].norm()))
                super().step()
                seen["after"].append(flat(group["params"]).detach())

        def spied_advantages(rewards, values, *args):
            result = compute_advantages(rewards, values, *args)
            seen["rollouts"].append(rewards.copy())
            seen["advantages"].append(result[0])
            seen["explained"].append(1 - np.var(result[1] - values[:-1]) / np.var(result[1]))
            return result

        def spied_loss(newlogprob, entropy, newvalue, mb_logprobs, *args):
            result = ppo_loss(newlogprob, entropy, newvalue, mb_logprobs, *args)
            seen["ratio"].append((newlogprob - mb_logprobs).exp().detach())
            seen["loss"].append(float(result[0].detach()))
            seen["stats"].append({f"losses/{name}": value.item() for name, value in result[1].items()})
            return result

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "compute_advantages", spied_advantages)
            patch.setattr(ppo, "ppo_loss", spied_loss)
            patch.setattr(torch.optim, "Adam", SpiedAdam)
            seen["run"] = run(flags, Agent=SpiedAgent)
        return seen

    return trace


def test_every_sample_is_used_exactly_once_per_epoch_in_a_new_order(trace):
    minibatches = trace(SMALL)["minibatches"]
    assert len(minibatches) == 4 * 3 * 2 and all(len(m) == 32 for m in minibatches)
    for update in range(4):
        epochs = [torch.cat(minibatches[i : i + 2]) for i in range(update * 6, update * 6 + 6, 2)]
        rows = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
        assert len(set(rows[0])) == 64  # no two samples are alike, so none can stand in for another
        assert rows[0] == rows[1] == rows[2]
        assert not epochs[0].equal(epochs[1])


def test_ratio_is_exactly_one_in_the_first_minibatch_of_each_update_and_not_after(trace):
    ratios = trace("--total-timesteps 1536")["ratio"]
    assert len(ratios) == 3 * 16
    for update in range(3):
        # Rollout and update pass the network in batches of different size, whose products may round differently.
        torch.testing.assert_close(ratios[update * 16], torch.ones(128), rtol=0, atol=3e-7)
        assert (ratios[update * 16 + 15] - 1).abs().max() > 1e-4


def test_logged_are_the_last_minibatch_s_stats_clipfrac_s_mean_and_the_explained_variance_of_the_whole_batch(trace):
    seen = trace("--total-timesteps 2048 --learning-rate 0.01")
    logged = {tag: [value for _, value in points] for tag, points in scalars(seen["run"].folder).items()}
    explained, clipfracs = logged.pop("losses/explained_variance"), logged.pop("losses/clipfrac")
    assert explained == pytest.approx(seen["explained"], abs=1e-4) and len({round(x, 3) for x in explained}) == 4
    expected = np.reshape([stats.pop("losses/clipfrac") for stats in seen["stats"]], (4, 16)).mean(1)
    assert clipfracs == pytest.approx(expected) and 0 < clipfracs[0] < 1
    for tag in seen["stats"][0]:
        assert logged[tag] == pytest.approx([seen["stats"][i][tag] for i in (15, 31, 47, 63)]), tag


def test_learning_rate_is_exact_in_every_update(trace):
    seen = trace(SMALL + " --learning-rate 0.001")
    assert seen["lr"][::6] == [0.001, 0.75 * 0.001, 0.5 * 0.001, 0.25 * 0.001]
    assert all(len(set(seen["lr"][i : i + 6])) == 1 for i in range(0, 24, 6))
    assert set(trace(SMALL + " --learning-rate 0.001 --no-anneal-lr")["lr"]) == {0.001}


def test_steps_are_those_of_adam_with_eps_1e_minus_5(trace):
    seen, m, v = trace(SMALL), 0, 0
    for t, (gradient, lr) in enumerate(zip(seen["grads"], seen["lr"], strict=True), start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)
        torch.testing.assert_close(seen["before"][t - 1] - step, seen["after"][t - 1], rtol=0, atol=3e-7)


def test_gradients_are_clipped_together_to_max_grad_norm(trace):
    free = trace(SMALL + " --max-grad-norm 1000")["grad_norm"]
    assert max(free) > 0.1
    clipped = trace(SMALL + " --max-grad-norm 0.1")["grad_norm"]
    assert max(clipped) == pytest.approx(0.1, rel=1e-3)
    assert clipped[0] == pytest.approx(min(0.1, free[0]), rel=1e-3)


def test_target_kl_ends_an_update_after_the_epoch_that_passed_it(trace):
    flags = "--total-timesteps 2048 --learning-rate 0.01 --update-epochs 8"
    assert len(trace(flags)["loss"]) == 4 * 8 * 4
    stopped = trace(flags + " --target-kl 0.001")
    assert len(stopped["loss"]) < 4 * 8 * 4 and len(stopped["loss"]) % 4 == 0  # only whole epochs
    assert len(stopped["rollouts"]) == 4  # the run goes on
    assert len(trace(flags + " --target-kl 1000")["loss"]) == 4 * 8 * 4


@pytest.mark.parametrize(
    "flag, changed",
    [
        ("--seed 2", {"rollout", "advantages", "shuffle", "loss", "grad_norm"}),
        ("--learning-rate 0.001", {"lr"}),
        ("--no-anneal-lr", set()),  # the first update's learning rate is the same; the later ones' are tested above
        ("--gamma 0.9", {"advantages", "loss", "grad_norm"}),
        ("--gae-lambda 0.5", {"advantages", "loss", "grad_norm"}),
        ("--no-gae", {"advantages", "loss", "grad_norm"}),
        ("--num-minibatches 4", {"shuffle", "loss", "grad_norm", "steps"}),
        ("--update-epochs 2", {"steps"}),
        ("--no-norm-adv", {"loss", "grad_norm"}),
        ("--ent-coef 0.5", {"loss", "grad_norm"}),
        ("--vf-coef 0.1", {"loss", "grad_norm"}),
        ("--max-grad-norm 0.01", {"grad_norm"}),
        ("--clip-coef 0.0001", set()),  # nothing to clip where the ratio is 1: see test_losses.py
        ("--no-clip-vloss", set()),
        ("--target-kl 1000", set()),
        ("--bootstrap-truncation", set()),  # no episode of CartPole reaches 500 steps here
        ("--no-torch-deterministic", set()),
        ("--no-cuda", set()),
        ("--num-threads 1", set()),
        ("--exp-name other", set()),
    ],
)
def test_each_flag_changes_what_it_names_and_nothing_else_until_the_first_step(flag, changed, trace):
    def first_update(flags):
        seen = trace(flags)
        return {
            "rollout": seen["rollouts"][0].tobytes() + repr(seen["run"].episodes[:1]).encode(),
            "advantages": seen["advantages"][0].tobytes(),
            "shuffle": seen["minibatches"][0].numpy().tobytes(),
            "lr": seen["lr"][0],
            "loss": seen["loss"][0],
            "grad_norm": seen["grad_norm"][0],
            "steps": len(seen["loss"]),
        }

    flags = "--total-timesteps 128 --num-envs 4 --num-steps 32 --num-minibatches 2 --update-epochs 3"  # one update
    flags += " --max-grad-norm 1000"  # clipped, norms would be the same
    before, after = first_update(flags), first_update(f"{flags} {flag}")
    assert {key for key in before if before[key] != after[key]} == changed


@pytest.mark.parametrize("flag", ["--clip-coef 0.01", "--no-clip-vloss", "--no-anneal-lr", "--target-kl 0.0001"])
def test_flags_that_act_after_the_first_step_change_the_outcome(flag, run):
    flags = "--total-timesteps 1024 --learning-rate 0.01"
    before, after = run(flags).agent, run(f"{flags} {flag}").agent
    assert not all(p.equal(q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("spelling, value", [
    ("--gae", True), ("--no-gae", False), ("--gae True", True), ("--gae False", False), ("--gae=false", False),
    ("--gae=TRUE", True), ("--track", True), ("--track=false", False), ("--no-track", False),
])  # fmt: skip
def test_booleans_accept_every_spelling(spelling, value):
    name = "gae" if "gae" in spelling else "track"
    assert getattr(ppo.parse_args(spelling.split()), name) is value


def test_defaults_are_those_of_the_design_and_sizes_are_derived():
    args = vars(ppo.parse_args([]))
    expected = dict(
        exp_name="ppo", env_id="CartPole-v1", learning_rate=2.5e-4, seed=1, total_timesteps=25000, cuda=True,
        torch_deterministic=True, num_threads=1, resume=None, checkpoint_interval=60, vectorization_mode="sync",
        track=False, wandb_project_name="cleanrl", wandb_entity=None, capture_video=False, num_envs=4, num_steps=128,
        anneal_lr=True, gae=True, gamma=0.99, gae_lambda=0.95, num_minibatches=4, update_epochs=4, norm_adv=True,
        clip_coef=0.2, clip_vloss=True, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5, target_kl=None,
        bootstrap_truncation=False, batch_size=512, minibatch_size=128, num_updates=48, world_size=1, rank=0,
        local_num_envs=4,
    )  # fmt: skip
    assert args == expected
    assert ppo.parse_args(["--gym-id", "Acrobot-v1"]).env_id == "Acrobot-v1"
    assert ppo.parse_args(["--gamma", "0.9"], gamma=0.5, learning_rate=3e-4).gamma == 0.9
    assert ppo.parse_args([], gamma=0.5).gamma == 0.5
