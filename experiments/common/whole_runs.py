"""Trains runs of experiments, which need all of a run or nothing."""

from collections.abc import Callable
from pathlib import Path

from ultramem_jax import RunConfig
from ultramem_jax.data import Corpus
from ultramem_jax.errors import Stopped
from ultramem_jax.training.initial import Initial
from ultramem_jax.training.loop import TrainResult, train


def train_whole(
    config: RunConfig,
    workdir: Path,
    *,
    corpus: Corpus | None = None,
    initial: Callable[[], Initial] | None = None,
) -> TrainResult:
    """Returns the result of a run after all of its steps; see `ultramem_jax.training.loop.train`.

    Raises:
        Stopped: SIGTERM came before. The same call goes on from there.
        UserError: as `train`.
    """
    trained = train(config, workdir, corpus=corpus, initial=initial)
    if not trained.finished:
        raise Stopped("stopped; the same command goes on from there")
    return trained
