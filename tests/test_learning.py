"""It learns: a longer run reaches what no random policy can."""

import numpy as np


def test_cartpole_reaches_returns_that_a_random_policy_cannot(run):
    flags = "--total-timesteps 16000 --learning-rate 0.001 --bootstrap-truncation"
    returns = [episodic_return for _, episodic_return, _ in run(flags).episodes]
    # A random policy reaches 22 on average, and hardly ever 100.
    assert np.mean(returns[:50]) < 60
    assert np.mean(returns[-20:]) > 150
