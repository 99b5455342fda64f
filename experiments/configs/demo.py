"""`make demo`: a small UltraMem model on the standard library's sources, on two CPU cores in minutes."""

import dataclasses

from ultramem_jax import RunConfig, TrainConfig
from ultramem_jax.presets import preset


def get_config() -> RunConfig:
    """`ultramem-tiny` with tables of 192² slots, 1.2 M tokens."""
    model = preset("ultramem-tiny")
    assert model.memory is not None
    return RunConfig(
        model=dataclasses.replace(model, memory=dataclasses.replace(model.memory, num_keys=192)),
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
