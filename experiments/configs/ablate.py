"""The ablation of UltraMem whose tables and figures are in experiments/results/ablate/."""

from ultramem_jax import DataConfig, RunConfig, TrainConfig


def get_config() -> RunConfig:
    """0.4 M bytes a run: the sixty runs take about 70 minutes on two CPU cores."""
    return RunConfig(
        data=DataConfig(seq_len=128),
        train=TrainConfig(
            steps=400,
            batch_size=8,
            learning_rate=3e-3,
            warmup_fraction=0.05,
            eval_every=200,
            eval_batches=64,
            checkpoint_every=0,
        ),
    )
