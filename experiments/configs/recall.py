"""Teaches 500 made-up people to six systems with 2 to 32 times as many sparse parameters as dense ones.

Command: python launch.py recall --workdir=runs/recall
Machine: 2 CPU cores.
Time: about two hours for 102 runs.
Result: experiments/results/recall/recall.md
"""

from ultramem_jax import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families


def get_config() -> RunConfig:
    """Returns a run of 1.5 M tokens, in which every person comes 29 times.

    500 people are too many to be learned completely in that time: at a rate of 0.006 a dense model held
    69 % of their bits, and Engram at size 16 held 75 %. The vocabulary has a token for most names and
    values. With half as many ids they fall into pieces: of 250 people a dense model then held 39 % of the
    bits after 50 s of CPU time, and 86 % with this vocabulary.
    """
    memory = families.ultramem(placement="1:2", num_keys=157, top_m=16, num_heads=1, key_dim=16, value_dim=32)
    model = ModelConfig(
        vocab_size=2048,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        mlp_dim=166,
        memories={"ultramem": memory},
    )
    data = DataConfig("facts:0-250x8", tokenizer="bpe", bpe_vocab_size=model.vocab_size, seq_len=128)
    train = TrainConfig(
        steps=1500,
        batch_size=4,
        warmup_fraction=0.05,
        log_every=50,
        eval_every=0,
        eval_batches=64,
        checkpoint_every=0,
        keep_last=1,
    )
    return RunConfig(model, data, train)
