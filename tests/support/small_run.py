"""Makes a run that trains in seconds, for tests of what happens around its steps."""

import signal

import numpy as np

from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import MetricWriter, read_metrics


def small_config(folder):
    """Returns six steps of a model with memory, buffers, dropout, accumulation and checkpoints."""
    rng = np.random.default_rng(0)
    words = ["memory", "slot", "key", "query", "\n", "token ", "value;"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 3000)))
    memory = families.ultramem(placement="1:1", num_keys=24, top_m=4, num_heads=2, key_dim=8, value_dim=8)
    model = ModelConfig(
        embed_dim=16,
        num_layers=1,  # each takes a third of a second to compile, in hundreds of runs
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=16,
        dropout=0.1,
        memories={"memory": memory},
    )
    return RunConfig(
        model=model,
        data=DataConfig("text", str(folder / "text.txt"), seq_len=16, cache_dir=str(folder / "cache")),
        train=TrainConfig(
            steps=6,
            batch_size=16,
            grad_accumulation=2,
            learning_rate=1e-2,
            log_every=1,
            eval_every=3,
            eval_batches=2,
            checkpoint_every=2,
        ),
    )


def train_tiny(folder, workdir, num_keys, steps):
    """Trains one layer with one memory of `num_keys`² slots; the corpus lies in `folder`."""
    (folder / "text.txt").write_text("read a slot\n" * 300)
    memory = families.ultramem(placement="1:1", num_keys=num_keys, top_m=4, key_dim=8, value_dim=8)
    config = RunConfig(
        ModelConfig(
            embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=16, memories={"memory": memory}
        ),
        DataConfig("text", str(folder / "text.txt"), seq_len=16, cache_dir=str(folder / "cache")),
        TrainConfig(steps=steps, batch_size=8, eval_batches=1),
    )
    train(config, workdir, progress=False)
    return workdir


def files(folder):
    """Returns the contents of all files below a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scalars(workdir):
    """Returns every record, without the one metric that is a measurement of time."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


def stop_at_three(monkeypatch):
    """Sends SIGTERM while the third step of a run is written down."""
    write = MetricWriter.write

    def stopping(self, step, split, scalars):
        write(self, step, split, scalars)
        if step == 3 and split == "train":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", stopping)
