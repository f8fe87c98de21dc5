"""Programs that measure ppo.py and its variants, and show what they found.

    learning      returns after training, beside those of other implementations, and
                  what each detail adds when it is switched off alone
    study         at which learning rates each detail matters
    throughput    speed and memory beside other implementations
    scaling       speed with more environments, threads and processes
    plots         pictures of what the four above have saved
    animation     a picture that moves, of a trained agent

Each is started like ``python -m benchmark.learning``. The first four save every run in
results/ and go on where they stopped. The others are their parts: runs, measures,
details, stable_baselines3 and slow_cartpole.
"""
