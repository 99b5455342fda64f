"""Holds the run and the hardware that plans are counted for by hand."""

import dataclasses
import functools

from ultramem_jax import MeshConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.config import DataConfig
from ultramem_jax.planning.compiled_step import CompiledStep, compile_step
from ultramem_jax.planning.hardware import Hardware
from ultramem_jax.presets import families

MODEL = ModelConfig(
    vocab_size=24,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=32,
    memories={
        "memory": families.ultramem(
            placement="1:1", num_keys=16, top_m=4, num_heads=1, key_dim=8, value_dim=8, query_conv_width=4
        )
    },
)
TINY = RunConfig(
    MODEL,
    data=DataConfig(seq_len=16),
    train=TrainConfig(batch_size=8),
    mesh=MeshConfig(data=2, memory=4),
)
ROUND = Hardware(
    name="round numbers",
    bf16_flops=2e9,
    fp32_flops=1e6,
    memory_bytes=1e6,
    memory_bytes_per_second=1e3,
    access_bytes=32,
    node_link_bytes=100,
    outer_link_bytes=10,
    devices_per_node=4,
)
# TINY's dense parameters: embedding 24·16, attention 4·16², MLP 2·16·32, norms 3·16; of the memory queries
# 16·2·8, keys 2·32·8, norms 2·8, cores 2·4, projection 4·8·16, convolution 16·4.
DENSE = 384 + 1024 + 1024 + 48 + 256 + 512 + 16 + 8 + 512 + 64


def by(partition: str, config: RunConfig = TINY) -> RunConfig:
    """Returns a run with its tables split in another way."""
    memory = config.model.memory.changed(partition=partition)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memories={"memory": memory}))


@functools.cache
def compiled_tiny() -> CompiledStep:
    """Returns the compiled step of `TINY`."""
    return compile_step(TINY)
