"""The comparison whose table and figure are in experiments/results/compare/."""

import dataclasses

from ultramem_jax import RunConfig
from ultramem_jax.recipes import demo


def get_config() -> RunConfig:
    """As the demo, longer: 1.4 M tokens a run."""
    config = demo.get_config()
    train = dataclasses.replace(config.train, steps=700, checkpoint_every=350)
    return dataclasses.replace(config, train=train)
