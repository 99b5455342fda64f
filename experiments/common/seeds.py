"""Trains many configs over several seeds, for the experiments that compare models.

Every run has a folder of its own. The folder holds what `train` writes and, once the run has ended,
`result.json`. An experiment can be stopped at any time: the same command trains only the runs that are
missing. Compiled programs are kept beside the runs.
"""

import dataclasses
import json
import math
import pathlib
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NotRequired, TypedDict

import jax

from experiments.common.whole_runs import train_whole
from ultramem_jax import RunConfig, UserError
from ultramem_jax.config import MeshConfig, run_config_from_dict, to_dict
from ultramem_jax.data import Corpus
from ultramem_jax.files import replace_text
from ultramem_jax.parallel.distributed import from_first, is_first
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.training.metrics import read_metrics
from ultramem_jax.training.state import model_variables
from ultramem_jax.tree_types import JsonDict


class Identity(TypedDict):
    """Identifies a result by its config, corpus, tokenizer and test."""

    config: JsonDict
    """Config of the run, as `to_dict` writes it."""
    corpus_hash: str
    tokenizer_hash: NotRequired[str]
    """Fingerprint of the tokenizer; results of older versions lack it."""
    test_batches: int | None
    """Evaluated batches of the test split: 0 for all, None for no test."""


class Result(Identity):
    """Holds the result of one run, as `result.json` keeps it."""

    environment: dict[str, str]
    """Strings from `describe_environment()`."""
    steps: list[int]
    """Steps at which the model was evaluated on the validation split."""
    bits: list[float]
    """Validation bits per byte at these steps."""
    test_bits: float | None
    """Test bits per byte after training; None without a test."""
    tokens_per_second: float
    """Tokens per second of the median training step; not finite if it was not measured."""


def train_over_seeds(
    configs: Mapping[str, RunConfig],
    seeds: int,
    corpus: Corpus,
    workdir: str | pathlib.Path,
    environment: Mapping[str, str],
    test_batches: int | None = None,
    keep_checkpoints: bool = True,
) -> dict[str, list[Result]] | None:
    """Trains every config with the seeds 0 to `seeds` - 1, but reads the results of runs that have ended.

    Args:
        configs: configs by name; their own seeds are replaced.
        seeds: number of runs of each config.
        corpus: corpus of all runs.
        workdir: folder of the experiment; the run of seed `s` is kept in `workdir`/NAME-seed`s`.
        environment: strings from `describe_environment()`, kept with each new result.
        test_batches: batches of the test split to evaluate at the end; 0 for all, None for no test.
        keep_checkpoints: False removes the checkpoints of a run that has ended, as many runs can fill a disk.

    Returns:
        The results of each config in the order of the seeds. In all processes but the first: None, since only
        the first one reports results.

    Raises:
        UserError: a folder holds a run of another config.
        Stopped: SIGTERM came.
    """
    remember_compilations(pathlib.Path(workdir) / "compiled")
    results: dict[str, list[Result]] = {name: [] for name in configs}
    # All configs of a seed come before the next seed, so that an interrupted experiment has every config.
    for seed in range(seeds):
        for name, config in configs.items():
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            folder = pathlib.Path(workdir) / f"{name}-seed{seed}"
            print(f"{name}, seed {seed}: {folder}", flush=True)
            result = _run(config, corpus, folder, environment, test_batches)
            if not keep_checkpoints and is_first():
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if result is not None:
                results[name].append(result)
    return results if is_first() else None


def training_in_words(base: RunConfig, corpus: Corpus) -> str:
    """Describes steps, batches, learning rate and corpus of runs that share them."""
    tokens = base.train.steps * base.train.batch_size * base.data.seq_len
    return (
        f"{base.train.steps} steps of {base.train.batch_size} × {base.data.seq_len} tokens "
        f"({tokens / 1e6:.2f} M), learning rate {base.train.learning_rate}; corpus {base.data.dataset}, "
        f"{corpus.num_tokens['train'] / 1e6:.2f} M tokens of training, hash {corpus.corpus_hash[:12]}."
    )


def common_environment(results: Mapping[str, Iterable[Result]]) -> dict[str, str]:
    """Returns the environment of all runs; where runs differ, all values that were found."""
    found: dict[str, list[str]] = {}
    for run in (run for runs in results.values() for run in runs):
        for name, value in run["environment"].items():
            found.setdefault(name, [])
            if value not in found[name]:
                found[name].append(value)
    return {name: "; ".join(values) for name, values in found.items()}


def final_bits(runs: Iterable[Result]) -> list[float]:
    """Returns the last validation bits per byte of each run."""
    return [run["bits"][-1] for run in runs]


def final_test_bits(runs: Iterable[Result]) -> list[float]:
    """Returns the test bits per byte of each run.

    Raises:
        UserError: a run has not been tested.
    """
    found = []
    for run in runs:
        if run["test_bits"] is None:
            raise UserError("a run has no test bits per byte; train it with a number of test batches")
        found.append(run["test_bits"])
    return found


def paired_differences(runs: Iterable[Result], base: Iterable[Result]) -> list[float]:
    """Returns the differences of the final validation bits per byte of two configs, seed by seed."""
    return [new - old for new, old in zip(final_bits(runs), final_bits(base), strict=True)]


def deviation(values: Sequence[float]) -> float | None:
    """Returns the standard deviation of a sample (n - 1); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def median_speed(runs: Iterable[Result]) -> int | None:
    """Returns the tokens per second of the median training step; None if no run could measure it."""
    speeds = [run["tokens_per_second"] for run in runs if math.isfinite(run["tokens_per_second"])]
    return round(statistics.median(speeds)) if speeds else None


def remember_compilations(folder: pathlib.Path) -> None:
    """Keeps compiled programs in a folder.

    The programs of a config are the same for every seed, and after an interruption.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def _wherever_trained(result: Identity, tokenizer_hash: str) -> tuple[RunConfig, str, str, int | None]:
    """Returns what identifies a result, without the mesh that it was trained on.

    Fields that configs did not have at the time of the result get their defaults.
    """
    config = dataclasses.replace(run_config_from_dict(result["config"]), mesh=MeshConfig())
    # Older results do not say by which tokenizer.
    tokenizer_hash = result.get("tokenizer_hash", tokenizer_hash)
    return config, result["corpus_hash"], tokenizer_hash, result["test_batches"]


def _run(
    config: RunConfig,
    corpus: Corpus,
    workdir: pathlib.Path,
    environment: Mapping[str, str],
    test_batches: int | None,
) -> Result | None:
    """Returns the result of one run, from its folder if the run was done before.

    Returns None in processes other than the first if the run was trained now; only the first one reports it.
    """
    done = workdir / "result.json"
    tokenizer = corpus.tokenizer.fingerprint
    identity: Identity = {
        "config": to_dict(config),
        "corpus_hash": corpus.corpus_hash,
        "tokenizer_hash": tokenizer,
        "test_batches": test_batches,
    }
    result: Result | None = from_first(json.loads(done.read_text()) if done.exists() else None)
    if result is not None:
        if _wherever_trained(result, tokenizer) != _wherever_trained(identity, tokenizer):
            raise UserError(
                f"{workdir} holds a run of another config, corpus, tokenizer or number of test batches; "
                "give another --workdir"
            )
        return result
    trained = train_whole(config, workdir, corpus=corpus)
    test_bits = None
    if test_batches is not None:
        evaluate = Evaluator(config, corpus, mesh_axes(config, make_mesh(config.mesh)))
        found = evaluate(model_variables(trained.state), "test", test_batches, progress=True)
        test_bits = found.bits_per_byte
    if not is_first():
        return None
    records = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "validation"]
    result = {
        **identity,
        "environment": dict(environment),
        "steps": [record["step"] for record in records],
        "bits": [record["bits_per_byte"] for record in records],
        "test_bits": test_bits,
        "tokens_per_second": trained.tokens_per_second,
    }
    replace_text(done, json.dumps(result))
    return result
