"""The comparison whose table and figure are in experiments/results/compare/."""

from ultramem_jax import RunConfig, TrainConfig
from ultramem_jax.presets import preset


def get_config() -> RunConfig:
    """1.4 M tokens a run."""
    return RunConfig(
        model=preset("ultramem-demo"),
        train=TrainConfig(
            steps=700,
            batch_size=8,
            learning_rate=3e-3,
            warmup_fraction=0.05,
            eval_every=100,
            eval_batches=32,
            checkpoint_every=350,
        ),
    )
