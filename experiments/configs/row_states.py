"""The runs whose table and figure are in experiments/results/row_states/."""

from ultramem_jax import DataConfig, RunConfig, TrainConfig
from ultramem_jax.presets import preset


def get_config() -> RunConfig:
    """0.4 M bytes a run: short, but long enough for every moment to have forgotten where it began."""
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
