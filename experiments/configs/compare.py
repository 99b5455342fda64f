"""The comparison whose table and figure are in experiments/results/compare/."""

import dataclasses

from ultramem_jax import RunConfig, TrainConfig
from ultramem_jax.presets import preset


def get_config() -> RunConfig:
    """Two tables of 192² values of width 64; the rest of the model is `ultramem-tiny`."""
    model = preset("ultramem-tiny")
    assert model.memory is not None
    return RunConfig(
        model=dataclasses.replace(model, memory=dataclasses.replace(model.memory, num_keys=192)),
        train=TrainConfig(
            steps=700,
            batch_size=8,
            learning_rate=3e-3,
            warmup_fraction=0.05,
            eval_every=100,
            eval_batches=32,
            checkpoint_every=350,
        ),
    )
