"""Makes the table of the comparison: the shape of each system, its costs and its results."""

import statistics

from experiments.common.seeds import (
    Result,
    deviation,
    final_bits,
    final_test_bits,
    median_speed,
    training_in_words,
)
from ultramem_jax import ModelConfig, RunConfig
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.data import Corpus
from ultramem_jax.reporting import markdown


def row(system: str, model: ModelConfig, runs: list[Result]) -> markdown.Row:
    """Returns the row of one system: counts, and means and deviations of measurements over its runs."""
    parameters, flops = count_parameters(model), flops_per_token(model)
    validation, test = final_bits(runs), final_test_bits(runs)
    return {
        "system": system,
        "shape": shape(model),
        "dense parameters": parameters.dense,
        "sparse parameters": parameters.sparse,
        "FLOPs per token": flops.matched,
        "validation bits/byte": statistics.fmean(validation),
        "± (val.)": deviation(validation),
        "test bits/byte": statistics.fmean(test),
        "± (test)": deviation(test),
        "tokens/s": median_speed(runs),
    }


def shape(model: ModelConfig) -> str:
    """Describes the shape that distinguishes a system from the others, in a few words."""
    words = [memories_in_words(model, name) for name in model.memories]
    if moe := model.moe:
        kind = "SwiGLU experts" if moe.activation == "swiglu" else "experts"
        return ", ".join([*words, f"{moe.top_k} of {moe.num_experts} {kind}, {moe.expert_dim} wide"])
    return ", ".join([*words, f"MLP {model.mlp_dim}"])


def memories_in_words(model: ModelConfig, name: str) -> str:
    """Describes the memories of one config in a few words."""
    sites = [site for site in model.sites if site.group == name]
    words = f"{len(sites)} × ({', '.join(model.memories[name].in_words())})"
    if sites and sites[0].config.table.is_shared:
        part = sites[0].window.size / sites[0].num_slots
        words += " on one table" if part == 1 else f", each on {part:.0%} of one table"
    return words


def notes(base: RunConfig, corpus: Corpus, models: dict[str, ModelConfig], seeds: int) -> list[str]:
    """Explains how all systems were trained, and how to read the columns."""
    return [
        training_in_words(base, corpus),
        "FLOPs per token: forward, two per weight that a token is multiplied by, plus scoring and lookups; "
        "attention scores and logits, equal for all, are left out.",
        f"Means over {seeds} seeds, ± one standard deviation; the same batches for every system.",
        f"One learning rate for all systems, not tuned for each.{_value_rates(models)}",
        "tokens/s: median training step, on a machine that other work shared; not a benchmark.",
    ]


def _value_rates(models: dict[str, ModelConfig]) -> str:
    """Returns the note on the learning rates of tables; empty without tables."""
    systems: dict[float, list[str]] = {}
    for system, model in models.items():
        for memory in model.memories.values():
            systems.setdefault(memory.value_lr_multiple, []).append(system)
    rates = [f"{multiple:g} × ({', '.join(systems[multiple])})" for multiple in sorted(systems)]
    return f" As multiples of it, the rate of the values starts at {', '.join(rates)}." if rates else ""
