"""Trains the ablation of UltraMem at the sizes and with the training of the paper (arXiv 2411.12364).

Command: python launch.py ablate --scale=151m --config=experiments/configs/ablate_151m.py
Machine: not run.
Time: not run.
Result: not run.

Steps, batch, learning rate, warm-up, decay and weight decay are those of the paper's table 1 at this size,
1.0 T tokens a run; its dropout of 0.1 is a part of the models. Evaluations and checkpoints are ours.

What else differs: the paper trains on RedPajama and validates on C4, here C4 is both; its tokenizer is
GPT-NeoX's, here byte-pair encoding with as many tokens is learned from C4. TFDS must have C4 as array_record,
in the folder `--config.data.path`; `--config.train.grad_accumulation` cuts the batch to what devices hold.
"""

from ultramem_jax import DataConfig, RunConfig, TrainConfig
from ultramem_jax.presets import preset


def get_config() -> RunConfig:
    """Returns the training of every run: 238,418 steps of 2048 × 2048 tokens."""
    return RunConfig(
        data=DataConfig(
            dataset="tfds:c4/en",
            tokenizer="bpe",
            bpe_vocab_size=preset("dense-151m").vocab_size,
            seq_len=2048,
        ),
        train=TrainConfig(
            steps=238_418,
            batch_size=2048,
            learning_rate=6e-4,
            warmup_fraction=0.01,
            final_lr_fraction=0.1,
            weight_decay=0.1,
            eval_every=5000,
            eval_batches=16,
            checkpoint_every=5000,
        ),
    )
