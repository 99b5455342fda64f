"""Trains a language model with 20,275,712 slots in two memories, on two CPU cores, in less than 16 GB.

Command: python launch.py train --config=experiments/configs/slots_20m.py --config.data.dataset=enwik8
    --config.data.path=enwik8.gz
Machine: 2 CPU cores (AMD EPYC, Zen 4), 23.5 GiB of host memory.
Time: 346 seconds for 200 steps, stopped and resumed after 100.
Result: experiments/results/slots_20m/slots_20m.md: at most 7.06 GB resident; a step takes 642 ms,
    1.28 times as long as that of 65,536 slots per memory.

`python launch.py large_table` with `--run=experiments/configs/slots_20m.py` makes the report; its last lines
have the whole command.

Values and first moments are bfloat16, rounded stochastically; of second moments there is one per row. That
makes 260 bytes a slot, 5.3 GB in all, where float32 with full Adam would take 768 and 15.6 GB. Without the
flags of the data it trains on the default corpus.
"""

from ultramem_jax import ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families


def get_config() -> RunConfig:
    """Returns a run of 0.4 M tokens."""
    return RunConfig(
        model=ModelConfig(
            embed_dim=256,
            num_layers=6,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=1024,
            memories={
                "ultramem": families.ultramem(
                    placement="2:3/4:5",
                    num_keys=3184,
                    top_m=16,
                    num_heads=2,
                    key_dim=64,
                    value_dim=64,
                    dtype="bfloat16",
                )
            },
        ),
        train=TrainConfig(
            steps=200,
            batch_size=8,
            learning_rate=2e-3,
            warmup_fraction=0.05,
            row_second_moment="row",
            row_moment_dtype="bfloat16",
            eval_every=50,
            eval_batches=16,
            checkpoint_every=50,
            keep_last=1,
        ),
    )
