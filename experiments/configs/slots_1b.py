"""Plans a language model with 1,073,741,824 slots in four memories, on 256 devices.

Command: python launch.py plan --config=experiments/configs/slots_1b.py --partition=slots,width --baseline=moe
    --out=experiments/results/plan/slots_1b.md
Machine: 2 CPU cores (AMD EPYC), 23.5 GiB of host memory; the 256 devices are simulated, and nothing is run.
Time: about 1.5 minutes for the three plans.
Result: experiments/results/plan/slots_1b.md: a device holds 19,925,505,816 bytes by slots and 24,877,236,248
    by width; a step on H100 SXM is estimated at 112.4 ms and 81.02 ms, all overlapped. The model has not been
    trained.

Values and first moments are bfloat16, of second moments there is one per row: 260 bytes a slot and one for
the record of slots seen, 280 GB in all. 64 devices along `memory` share them, and so does each of the four
groups along `data`. By slots a device holds 6.4 GB of state, by width 11.7: there it has the second moment
and the record of every row.
"""

from ultramem_jax import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families


def get_config() -> RunConfig:
    """Returns a run with 1 M tokens a step."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=32768,
            embed_dim=1024,
            num_layers=8,
            num_heads=16,
            num_kv_heads=16,
            mlp_dim=4096,
            dtype="bfloat16",
            memories={
                "ultramem": families.ultramem(
                    placement="1:2/3:4/5:6/7:8",
                    num_keys=16384,
                    top_m=16,
                    num_heads=2,
                    key_dim=64,
                    value_dim=64,
                    dtype="bfloat16",
                )
            },
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=32768, seq_len=1024),
        train=TrainConfig(
            steps=10_000,
            batch_size=1024,
            row_second_moment="row",
            row_moment_dtype="bfloat16",
        ),
        mesh=MeshConfig(data=4, memory=64),
    )
