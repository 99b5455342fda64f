"""Trains a language model with 100,000,000 slots on two CPU cores.

Command: python launch.py train --config=experiments/configs/slots_100m.py --config.data.dataset=enwik8
    --config.data.path=enwik8.gz
Machine: 2 CPU cores (AMD EPYC, Zen 4), 23.5 GiB of host memory.
Time: 464 seconds for 300 steps, stopped and resumed after 150.
Result: experiments/results/slots_100m/slots_100m.md: at most 15.4 GB resident; a step takes 673 ms,
    1.32 times as long as that of 1,000,000 slots.

`python launch.py large_table` runs it, stops and resumes it, and records its host memory.

Rows of 64 values are bfloat16, rounded stochastically. Row-wise Adagrad keeps one float32 number of each row.
That makes 132 bytes a slot, 13.2 GB in all, where float32 with Adam would take 768 and 77 GB.
"""

from ultramem_jax import ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families


def get_config() -> RunConfig:
    """Returns a run of 0.6 M tokens."""
    return RunConfig(
        model=ModelConfig(
            embed_dim=256,
            num_layers=6,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=1024,
            memories={
                "ultramem": families.ultramem(
                    placement="3:5",
                    num_keys=10_000,
                    top_m=16,
                    num_heads=2,
                    key_dim=64,
                    value_dim=64,
                    dtype="bfloat16",
                )
            },
        ),
        train=TrainConfig(
            steps=300,
            batch_size=8,
            learning_rate=2e-3,
            warmup_fraction=0.05,
            row_optimizer="adagrad_row",
            eval_every=100,
            eval_batches=16,
            checkpoint_every=100,
            keep_last=1,
            log_every=10,
        ),
    )
