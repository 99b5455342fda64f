"""Trains the ablation of UltraMem, one change at a time, on small models.

Command: python launch.py ablate --scale=tiny --config=experiments/configs/ablate.py
Machine: 2 CPU cores (Intel Xeon), 23.5 GiB of host memory.
Time: about 70 minutes for the sixty runs.
Result: experiments/results/ablate/ladder.md: from PKM to UltraMem, validation bits per byte go from
    2.632 ± 0.010 to 2.567 ± 0.023. The grids of E, r and h are in experiments/results/ablate/grids.md.
"""

from ultramem_jax import DataConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    """Returns the training of every run: 0.4 M bytes each."""
    return RunConfig(
        data=DataConfig(seq_len=128),
        train=TrainConfig(
            steps=400,
            batch_size=8,
            learning_rate=3e-3,
            warmup_fraction=0.05,
            eval_every=200,
            eval_batches=64,
            checkpoint_every=0,
        ),
    )
