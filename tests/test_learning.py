"""It learns: a longer run reaches what no random policy can."""

import numpy as np


def test_cartpole_reaches_returns_that_a_random_policy_cannot(run):
    result = run("--total-timesteps 50000 --learning-rate 0.001 --bootstrap-truncation")
    first, last = ([r for _, r, _ in part] for part in (result.episodes[:50], result.episodes[-20:]))
    assert np.mean(first) < 60  # as good as random, which brings 22 on average and hardly ever 100
    assert np.mean(last) > 150
