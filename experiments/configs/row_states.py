"""Trains one model with each choice of what is kept of a table's rows.

Command: python launch.py row_states --seeds=2
Machine: 2 CPU cores (Intel Xeon), 23.5 GiB of host memory.
Time: not recorded.
Result: experiments/results/row_states/row_states.md: a bfloat16 table and moments with one second moment per
    row, 260 bytes a slot instead of 768, raise the validation bits per byte by 0.0175 ± 0.0034.

Without `--config`, `row_states` takes this file.
"""

from ultramem_jax import DataConfig, RunConfig, TrainConfig
from ultramem_jax.presets import preset


def get_config() -> RunConfig:
    """Returns runs of 0.4 M bytes: short, but long enough for every moment to forget its start."""
    return RunConfig(
        model=preset("ultramem-tiny"),
        data=DataConfig(seq_len=256),
        train=TrainConfig(
            steps=200,
            batch_size=8,
            learning_rate=3e-3,
            warmup_fraction=0.05,
            eval_every=100,
            eval_batches=64,
            checkpoint_every=0,
        ),
    )
