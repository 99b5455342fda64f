"""Trains UltraMem and its baselines at equal compute and equal sparse parameters.

Command: python launch.py compare --config=experiments/configs/compare.py --systems=ultramem,dense,moe,pkm
Machine: 2 CPU cores (Intel Xeon), 23.5 GiB of host memory.
Time: about 40 minutes for the twelve runs.
Result: experiments/results/compare/compare.md: 2.087 ± 0.019 validation bits per byte for UltraMem,
    2.087 ± 0.002 for MoE, 2.162 ± 0.020 for dense, 2.172 ± 0.016 for PKM.
"""

import dataclasses

from ultramem_jax import RunConfig
from ultramem_jax.recipes import demo


def get_config() -> RunConfig:
    """Returns the demo with more steps: 1.4 M tokens a run."""
    config = demo.get_config()
    train = dataclasses.replace(config.train, steps=700, checkpoint_every=350)
    return dataclasses.replace(config, train=train)
