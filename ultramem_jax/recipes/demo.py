"""Trains a small UltraMem model on the standard library's sources, in minutes.

Command: ultramem train --config=demo
Machine: 2 CPU cores.
Time: about 2 minutes.
Result: README.md: about 2.1 bits per byte on the validation split.
"""

from ultramem_jax import RunConfig, TrainConfig
from ultramem_jax.presets import preset


def get_config() -> RunConfig:
    """Returns a run of 1.2 M tokens."""
    return RunConfig(
        model=preset("ultramem-demo"),
        train=TrainConfig(
            steps=600,
            batch_size=8,
            learning_rate=3e-3,
            warmup_fraction=0.05,
            eval_every=100,
            eval_batches=32,
            checkpoint_every=200,
        ),
    )
