"""UltraMem and its rivals at equal compute and equal sparse parameters.

The base is a model with UltraMem memories; `ultramem_jax.matching` builds the other systems with the same
FLOPs per token and the same sparse parameters, within 2 %. All train with the same settings on the same
batches, over several seeds. A run that was cut off, or an experiment that was, goes on with the same command.
"""

import dataclasses
import pathlib
import statistics
from typing import Any

from absl import flags

from experiments import cli, report
from experiments.seeds import (
    Result,
    common_environment,
    deviation,
    final_bits,
    median_speed,
    train_over_seeds,
)
from ultramem_jax import ModelConfig, RunConfig, UserError
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.data import Corpus, load_corpus
from ultramem_jax.errors import unknown
from ultramem_jax.matching import SYSTEMS, match, verify_match
from ultramem_jax.presets import preset

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
    configs = {system: dataclasses.replace(base, model=model) for system, model in models.items()}
    results = train_over_seeds(
        configs, SEEDS.value, corpus, WORKDIR.value, environment, test_batches=TEST_BATCHES.value
    )
    if results is None:
        return
    folder = pathlib.Path(RESULTS.value)
    rows = [_row(system, models[system], runs) for system, runs in results.items()]
    table, _ = report.write_table(
        rows,
        folder / "compare",
        "Systems at equal compute",
        common_environment(results),
        _notes(base, corpus, models),
    )
    figure = report.plot_curves(
        {system: [(run["steps"], run["bits"]) for run in runs] for system, runs in results.items()},
        folder / "compare.png",
        title=f"Equal FLOPs per token and sparse parameters, {base.data.dataset}",
        ylabel="validation bits per byte",
    )
    print(f"\n{table.read_text()}\nfigure: {figure}")


def _row(system: str, model: ModelConfig, runs: list[Result]) -> dict[str, Any]:
    parameters, flops = count_parameters(model), flops_per_token(model)
    validation, test = final_bits(runs), [run["test_bits"] for run in runs]
    return {
        "system": system,
        "shape": _shape(model),
        "dense parameters": parameters.dense,
        "sparse parameters": parameters.sparse,
        "FLOPs per token": flops.matched,
        "validation bits/byte": statistics.fmean(validation),
        "± (val.)": deviation(validation),
        "test bits/byte": statistics.fmean(test),
        "± (test)": deviation(test),
        "tokens/s": median_speed(runs),
    }


def _shape(model: ModelConfig) -> str:
    """What distinguishes a system from the others, in a few words."""
    if moe := model.moe:
        kind = "SwiGLU experts" if moe.activation == "swiglu" else "experts"
        return f"{moe.top_k} of {moe.num_experts} {kind}, {moe.expert_dim} wide"
    if memory := model.memory:
        words = [f"n {memory.num_keys}"]
        if memory.expansion > 1:
            words.append(f"E {memory.expansion}")
        if memory.tucker_rank:
            words.append(f"r {memory.tucker_rank}")
        words += [f"d_k {memory.key_dim}", f"d_v {memory.value_dim}"]
        if memory.pre_value_dim:
            words.append(f"d_p {memory.pre_value_dim}")
        words.append(f"{memory.num_heads}·{memory.top_m} reads")
        norms = {"query": memory.norm_query, "key": memory.norm_keys}
        words += ["/".join(name for name, on in norms.items() if on) + " norm"] if any(norms.values()) else []
        if memory.gate:
            words.append("gate")
        shape = f"{len(model.spans)} × ({', '.join(words)})"
        if memory.shares_table and model.layout:
            part = model.layout.window_slots / model.layout.num_slots
            shape += " on one table" if part == 1 else f", each on {part:.0%} of one table"
        return f"{shape}, MLP {model.mlp_dim}"
    return f"MLP {model.mlp_dim}"


def _value_rates(models: dict[str, ModelConfig]) -> str:
    """The note on the learning rates of tables; empty without any."""
    systems: dict[float, list[str]] = {}
    for system, model in models.items():
        if model.memory:
            systems.setdefault(model.memory.value_lr_multiple, []).append(system)
    rates = [f"{multiple:g} × ({', '.join(systems[multiple])})" for multiple in sorted(systems)]
    return f" As multiples of it, the rate of the values starts at {', '.join(rates)}." if rates else ""


def _notes(base: RunConfig, corpus: Corpus, models: dict[str, ModelConfig]) -> list[str]:
    tokens = base.train.steps * base.train.batch_size * base.data.seq_len
    return [
        f"{base.train.steps} steps of {base.train.batch_size} × {base.data.seq_len} tokens "
        f"({tokens / 1e6:.2f} M), learning rate {base.train.learning_rate}; corpus {base.data.dataset}, "
        f"{corpus.num_tokens['train'] / 1e6:.2f} M tokens of training, hash {corpus.corpus_hash[:12]}.",
        "FLOPs per token: forward, two per weight that a token is multiplied by, plus scoring and lookups; "
        "attention scores and logits, equal for all, are left out.",
        f"Means over {SEEDS.value} seeds, ± one standard deviation; the same batches for every system.",
        f"One learning rate for all systems, not tuned for each.{_value_rates(models)}",
        "tokens/s: median training step, on a machine that other work shared; not a benchmark.",
    ]
