"""Teaches 500 made-up people to six systems with 2 to 32 times as many sparse parameters as dense ones.

Command: python launch.py recall --workdir=runs/recall
Machine: 2 CPU cores.
Time: about two and a half hours for 86 runs.
Result: experiments/results/recall/recall.md: with 29 exposures of a fact only Engram gains beyond the noise,
    12,104 bits with 32 times as many sparse parameters; the dense model holds 9,557.
"""

from ultramem_jax import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families


def get_config() -> RunConfig:
    """Returns a run of 1.5 M tokens, in which every person comes about 30 times.

    That is too little for a small dense model to learn them all. The vocabulary has a token for most names
    and values: with half as many ids they fall into pieces, and are learned more slowly.
    """
    memory = families.ultramem(placement="1:2", num_keys=136, top_m=16, num_heads=1, key_dim=8, value_dim=24)
    model = ModelConfig(
        vocab_size=2048,
        embed_dim=48,
        num_layers=2,
        num_heads=3,
        num_kv_heads=3,
        mlp_dim=128,
        memories={"ultramem": memory},
    )
    data = DataConfig("facts:0-500x8", tokenizer="bpe", bpe_vocab_size=model.vocab_size, seq_len=128)
    train = TrainConfig(
        steps=3000,
        batch_size=4,
        warmup_fraction=0.05,
        log_every=100,
        eval_every=0,
        eval_batches=64,
        checkpoint_every=0,
        keep_last=1,
    )
    return RunConfig(model, data, train)
