"""Many configs, each trained over several seeds: what the experiments that compare models share.

Every run has a folder of its own. It holds what `train` writes and, once the run has ended, `result.json`:
the experiment can be stopped at any time, and the same command trains only what is missing. Compiled programs
are kept beside them.
"""

import dataclasses
import json
import math
import pathlib
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from ultramem_jax import RunConfig, UserError
from ultramem_jax.config import MeshConfig, run_config_from_dict, to_dict
from ultramem_jax.data import Corpus
from ultramem_jax.errors import Stopped
from ultramem_jax.files import replace_text
from ultramem_jax.parallel.distributed import from_first, is_first
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import read_metrics
from ultramem_jax.training.state import model_variables

Result = dict[str, Any]
"""Of one run: `steps` and `bits` (validation bits per byte), `test_bits`, `tokens_per_second`, `environment`,
and what it is a result of: `config`, `corpus_hash`, `tokenizer_hash`, `test_batches`."""


def train_over_seeds(
    configs: Mapping[str, RunConfig],
    seeds: int,
    corpus: Corpus,
    workdir: str | pathlib.Path,
    environment: Mapping[str, str],
    test_batches: int | None = None,
    keep_checkpoints: bool = True,
) -> dict[str, list[Result]] | None:
    """Trains every config with the seeds 0 to `seeds` - 1; what was done before is read from its folder.

    Args:
        configs: by name; their own seeds are replaced.
        seeds: runs of each config.
        corpus: of all of them.
        workdir: run s of a config is kept in `workdir`/NAME-seed`s`.
        environment: of `describe_environment()`, kept with each new result.
        test_batches: batches of the test split to evaluate at the end, 0 for all, None for no test.
        keep_checkpoints: False removes those of a run that has ended: many runs would fill a disk.

    Returns:
        The results of each config in the order of the seeds; None in all processes but the first: there is
        one to report them.

    Raises:
        UserError: a folder holds a run of another config.
        Stopped: SIGTERM came.
    """
    _remember_compilations(pathlib.Path(workdir) / "compiled")
    results: dict[str, list[Result]] = {name: [] for name in configs}
    # Seed by seed, so that an experiment cut short has every config.
    for seed in range(seeds):
        for name, config in configs.items():
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            folder = pathlib.Path(workdir) / f"{name}-seed{seed}"
            print(f"{name}, seed {seed}: {folder}", flush=True)
            result = _run(config, corpus, folder, environment, test_batches)
            if not keep_checkpoints and is_first():
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            results[name].append(result)
    return results if is_first() else None


def training_in_words(base: RunConfig, corpus: Corpus) -> str:
    """Steps, batches, learning rate and corpus of runs that differ in their models and seeds alone."""
    tokens = base.train.steps * base.train.batch_size * base.data.seq_len
    return (
        f"{base.train.steps} steps of {base.train.batch_size} × {base.data.seq_len} tokens "
        f"({tokens / 1e6:.2f} M), learning rate {base.train.learning_rate}; corpus {base.data.dataset}, "
        f"{corpus.num_tokens['train'] / 1e6:.2f} M tokens of training, hash {corpus.corpus_hash[:12]}."
    )


def common_environment(results: Mapping[str, Iterable[Result]]) -> dict[str, str]:
    """Where the runs were made; where they differ, all that was found."""
    found: dict[str, list[str]] = {}
    for run in (run for runs in results.values() for run in runs):
        for name, value in run["environment"].items():
            found.setdefault(name, [])
            if value not in found[name]:
                found[name].append(value)
    return {name: "; ".join(values) for name, values in found.items()}


def final_bits(runs: Iterable[Result]) -> list[float]:
    """The last validation bits per byte of each run."""
    return [run["bits"][-1] for run in runs]


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample (n - 1); None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def median_speed(runs: Iterable[Result]) -> int | None:
    """Tokens per second of the median training step; None if no run could measure it."""
    speeds = [run["tokens_per_second"] for run in runs if math.isfinite(run["tokens_per_second"])]
    return round(statistics.median(speeds)) if speeds else None


def _remember_compilations(folder: pathlib.Path) -> None:
    """Keeps what XLA compiles: the programs of a config are the same for every seed, and after a break."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def _wherever_trained(result: Result) -> tuple[Any, ...]:
    """What a result is a result of, on whichever mesh; fields that configs did not have then are default."""
    config = dataclasses.replace(run_config_from_dict(result["config"]), mesh=MeshConfig())
    return config, result["corpus_hash"], result["tokenizer_hash"], result["test_batches"]


def _run(
    config: RunConfig,
    corpus: Corpus,
    workdir: pathlib.Path,
    environment: Mapping[str, str],
    test_batches: int | None,
) -> Result:
    """Returns one run's validation curve and test loss, from its folder if it was done before.

    In processes but the first one, which reports it, the result of a run may be empty.
    """
    done = workdir / "result.json"
    tokenizer = {"tokenizer_hash": corpus.tokenizer.fingerprint}
    identity = {
        "config": to_dict(config),
        "corpus_hash": corpus.corpus_hash,
        **tokenizer,
        "test_batches": test_batches,
    }
    result = from_first(json.loads(done.read_text()) if done.exists() else None)
    if result is not None:
        # Older results do not say by which tokenizer.
        if _wherever_trained(tokenizer | result) != _wherever_trained(identity):
            raise UserError(
                f"{workdir} holds a run of another config, corpus, tokenizer or number of test batches; "
                "give another --workdir"
            )
        return result
    trained = train(config, workdir, corpus=corpus)
    if not trained.finished:
        raise Stopped("stopped; the same command goes on from there")
    test_bits = None
    if test_batches is not None:
        evaluate = Evaluator(config, corpus, mesh_axes(config, make_mesh(config.mesh)))
        found = evaluate(model_variables(trained.state), "test", test_batches, progress=True)
        test_bits = found.bits_per_byte
    if not is_first():
        return {}
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
