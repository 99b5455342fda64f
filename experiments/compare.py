"""Dense, MoE, PKM and UltraMem at equal compute and equal sparse parameters.

The base is a model with UltraMem memories; `ultramem_jax.matching` builds the other systems with the same
FLOPs per token and the same sparse parameters, within 2 %. All train with the same settings on the same
batches, over several seeds. A run that was cut off, or an experiment that was, goes on with the same command.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from typing import Any

from absl import flags

from experiments import cli, report
from ultramem_jax import ModelConfig, RunConfig, UserError
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.config import to_dict
from ultramem_jax.data import Corpus, load_corpus
from ultramem_jax.errors import unknown
from ultramem_jax.matching import SYSTEMS, match, verify_match
from ultramem_jax.presets import preset
from ultramem_jax.training.loop import Evaluator, train
from ultramem_jax.training.metrics import read_metrics
from ultramem_jax.training.state import model_variables

BASE_CONFIG = RunConfig(model=preset("ultramem-tiny"))

SYSTEM_NAMES = flags.DEFINE_list("systems", list(SYSTEMS), "which systems, of " + ", ".join(SYSTEMS))
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each system, seeds 0 to this - 1", lower_bound=1)
TEST_BATCHES = flags.DEFINE_integer("test_batches", 64, "batches of the test split; 0 is all", lower_bound=0)
WORKDIR = flags.DEFINE_string("workdir", "runs/compare", "folder of the runs")
RESULTS = flags.DEFINE_string("results", "experiments/results/compare", "folder of table and figure")


def main() -> None:
    """Trains every system with every seed; writes the table and the figure."""
    base = cli.run_config()
    if not SYSTEM_NAMES.value:
        raise UserError(f"--systems = '': name at least one of {', '.join(SYSTEMS)}")
    for system in SYSTEM_NAMES.value:
        if system not in SYSTEMS:
            raise unknown("system", system, SYSTEMS)
    # Taken now: the code that runs is the one that was checked out when the process started.
    environment = report.environment()
    models = {system: match(base.model, system) for system in SYSTEM_NAMES.value}
    verify_match({"base": base.model, **models})
    corpus = load_corpus(base.data)
    corpus.source("test")  # refuses a split that is too short before anything is trained
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in models}
    # Seed by seed, so that a comparison cut short has every system.
    for seed in range(SEEDS.value):
        for system, model in models.items():
            settings = dataclasses.replace(base.train, seed=seed)
            config = dataclasses.replace(base, model=model, train=settings)
            workdir = pathlib.Path(WORKDIR.value) / f"{system}-seed{seed}"
            print(f"{system}, seed {seed}: {workdir}", flush=True)
            result = _run(config, corpus, workdir, environment)
            if result is None:
                print("stopped; the same command goes on from there")
                return
            results[system].append(result)
    folder = pathlib.Path(RESULTS.value)
    rows = [_row(system, models[system], runs) for system, runs in results.items()]
    table, _ = report.write_table(
        rows,
        folder / "compare",
        "Systems at equal compute",
        _common([run["environment"] for runs in results.values() for run in runs]),
        _notes(base, corpus),
    )
    figure = report.plot_curves(
        {system: [(run["steps"], run["bits"]) for run in runs] for system, runs in results.items()},
        folder / "compare.png",
        title=f"Equal FLOPs per token and sparse parameters, {base.data.dataset}",
        ylabel="validation bits per byte",
    )
    print(f"\n{table.read_text()}\nfigure: {figure}")


def _run(
    config: RunConfig, corpus: Corpus, workdir: pathlib.Path, environment: dict[str, str]
) -> dict[str, Any] | None:
    """One run's validation curve and test loss, from its folder if it was done before; None if stopped."""
    done = workdir / "result.json"
    identity = {
        "config": to_dict(config),
        "corpus_hash": corpus.corpus_hash,
        "test_batches": TEST_BATCHES.value,
    }
    if done.exists():
        result = json.loads(done.read_text())
        if {name: result[name] for name in identity} != identity:
            raise UserError(
                f"{workdir} holds a run of another config, corpus or --test_batches; give another --workdir"
            )
        return result
    trained = train(config, workdir, corpus=corpus)
    if not trained.finished:
        return None
    evaluate = Evaluator(config, corpus)
    test = evaluate(model_variables(trained.state), "test", TEST_BATCHES.value, progress=True)
    records = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "validation"]
    result = {
        **identity,
        "environment": environment,
        "steps": [record["step"] for record in records],
        "bits": [record["bits_per_byte"] for record in records],
        "test_bits": test[1],
        "tokens_per_second": trained.tokens_per_second,
    }
    partial = done.with_suffix(".tmp")
    partial.write_text(json.dumps(result))
    partial.rename(done)
    return result


def _common(environments: list[dict[str, str]]) -> dict[str, str]:
    """Where the runs were made; where they differ, all that was found."""
    found: dict[str, list[str]] = {}
    for environment in environments:
        for name, value in environment.items():
            found.setdefault(name, [])
            if value not in found[name]:
                found[name].append(value)
    return {name: "; ".join(values) for name, values in found.items()}


def _row(system: str, model: ModelConfig, runs: list[dict[str, Any]]) -> dict[str, Any]:
    parameters, flops = count_parameters(model), flops_per_token(model)
    validation, test = ([run["bits"][-1] for run in runs], [run["test_bits"] for run in runs])
    speed = [run["tokens_per_second"] for run in runs if math.isfinite(run["tokens_per_second"])]
    return {
        "system": system,
        "shape": _shape(model),
        "dense parameters": parameters.dense,
        "sparse parameters": parameters.sparse,
        "FLOPs per token": flops.matched,
        "validation bits/byte": statistics.fmean(validation),
        "± (val.)": statistics.stdev(validation) if len(runs) > 1 else None,
        "test bits/byte": statistics.fmean(test),
        "± (test)": statistics.stdev(test) if len(runs) > 1 else None,
        "tokens/s": round(statistics.median(speed)) if speed else None,
    }


def _shape(model: ModelConfig) -> str:
    """What distinguishes a system from the others, in a few words."""
    if model.moe:
        return f"{model.moe.top_k} of {model.moe.num_experts} experts, {model.moe.expert_dim} wide"
    if memory := model.memory:
        size = f"n {memory.num_keys}, d_k {memory.key_dim}, d_v {memory.value_dim}"
        reads = f"{memory.num_heads}·{memory.top_m} reads"
        return f"{len(model.spans)} × ({size}, {reads}), MLP {model.mlp_dim}"
    return f"MLP {model.mlp_dim}"


def _notes(base: RunConfig, corpus: Corpus) -> list[str]:
    tokens = base.train.steps * base.train.batch_size * base.data.seq_len
    return [
        f"{base.train.steps} steps of {base.train.batch_size} × {base.data.seq_len} tokens "
        f"({tokens / 1e6:.2f} M), learning rate {base.train.learning_rate}; corpus {base.data.dataset}, "
        f"{corpus.num_tokens['train'] / 1e6:.2f} M tokens of training, hash {corpus.corpus_hash[:12]}.",
        "FLOPs per token: forward, two per weight that a token is multiplied by, plus scoring and lookups; "
        "attention scores and logits, equal for all, are left out.",
        f"Means over {SEEDS.value} seeds, ± one standard deviation; the same batches for every system.",
        "One learning rate for all systems, not tuned for each. The values of UltraMem learn at "
        f"{base.model.memory.value_lr_multiple if base.model.memory else 1:g} times that rate at first (one "
        "of its changes), those of PKM at 1 times, as published.",
        "tokens/s: median training step, on a machine that other work shared; not a benchmark.",
    ]
