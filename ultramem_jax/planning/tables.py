"""Writes the document of `plan` in Markdown, and its numbers as JSON."""

import math
import pathlib
from collections.abc import Mapping, Sequence

from ultramem_jax.parallel.mesh import in_words
from ultramem_jax.planning.compiled_step import DeviceBytes
from ultramem_jax.planning.hardware import Hardware
from ultramem_jax.planning.partition import TITLES, WAYS, Costs, crossover, verdict
from ultramem_jax.planning.plans import Plan
from ultramem_jax.planning.programs import mesh_sizes
from ultramem_jax.planning.records import PlanStudy
from ultramem_jax.planning.step_time import TimePart
from ultramem_jax.planning.traffic import Traffic
from ultramem_jax.reporting import markdown

_GIGA, _TERA, _MILLI = 1e9, 1e12, 1e-3
_HELD = {
    "parameters": "parameters",
    "optimizer": "their optimizer state",
    "tables": "tables",
    "row_moments": "row moments",
    "slots_seen": "record of slots seen",
    "other_state": "buffers and counters",
    "batch": "batch",
    "temporaries": "activations and temporaries",
}
"""Names of the fields of `DeviceBytes` in the table."""
_NOT_OF_A_PLAN = ("cpu", "cores", "memory", "os", "devices")
"""Entries of `describe_environment` that are left out, because no number of a plan depends on them."""
_ABOUT = (
    "Nothing was run: the step was compiled ahead of time for simulated devices, with abstract arrays. "
    "Bytes of the state are exact. Temporaries are the figure of the CPU's compiler, which another one "
    "will not reproduce: it keeps much of bfloat16 in float32. Padding, as TPUs pad narrow arrays, is in no "
    "figure."
)
_ABOUT_TARGET = (
    "Nothing was run: the step was compiled ahead of time by {compiler}, with abstract arrays. Bytes of the "
    "state are exact, without padding of layouts. Temporaries and collectives are those of the program that "
    "such devices would run."
)
_COLLECTIVES = (
    "Bytes are what one device sends in a step, by the algorithms that send least. `compiled` is read from "
    "the program, `formula` is `ultramem_jax.accounting.step_transfers`. {compiler}`by data`: in a loop "
    "whose length depends on the data; counted are the passes for the expected reads, or those of a balanced "
    "load. Formulas leave out scalars and the axis `tensor`."
)
_COLLECTIVES_ON_CPU = (
    "The CPU's compiler exchanges bfloat16 as float32, for which `compiled` is up to twice the formula. "
)
_TIME = (
    "An estimate from published rates, not a measurement. Links: the formula's bytes, and where there is "
    "none the program's. A group that lies within a node has the fast links, any other the slow ones for all "
    "that it sends. Rows: a read costs whole accesses of {access} bytes. Left out are activations in memory, "
    "sorting and top-k, so that a real step is slower than `all overlapped` and may be slower than `nothing "
    "overlapped`."
)
_PARTITION = (
    "One lookup of one memory, forward, on one device with {tokens:,} tokens of its own; MB sent to other "
    "devices, and ms of sending and reading rows one after the other. By width every device reads d_v/P "
    "columns of all rows that its group of P reads: the same bytes for every P, until a part of a row is "
    "smaller than the smallest access, {access} bytes, from where they grow with P. Blank where P does not "
    "divide. The backward pass of `slots` and `width` sends as much once more, but for the addresses. The "
    "paper's formulas have one score per read and, by dimension, one sum per token; ours have {cores} scores "
    "and {blocks} sums, one for each core and virtual block."
)


def render(study: PlanStudy) -> str:
    """Returns the whole document in Markdown."""
    plans, hardware = study.plans, study.hardware
    sizes = mesh_sizes(plans[0].config.mesh)
    devices = math.prod(sizes.values())
    parts = [f"# Plan: {study.title} on {in_words(sizes)} ({devices:,} × {hardware.name})"]
    compiler = plans[0].compiler
    parts.append(_ABOUT_TARGET.format(compiler=compiler) if compiler else _ABOUT)
    parts += [f"`{plan.name}`: {plan.note}." for plan in plans if plan.note]
    parts += ["## Bytes per device", markdown.table(byte_rows(plans, hardware))]
    for plan in plans:
        heading = f"## Collectives of a step: {plan.name}"
        parts += [heading, markdown.table(traffic_rows(plan.traffic), ["purpose", "kind", "axes", "times"])]
    collectives = _COLLECTIVES.format(compiler="" if compiler else _COLLECTIVES_ON_CPU)
    parts += [collectives] if devices > 1 else []
    parts += ["## Time of a step", markdown.table(time_rows(plans))]
    parts += [markdown.table(bound_rows(plans)), _TIME.format(access=hardware.access_bytes)]
    if study.partitions is not None:
        tokens, costs = study.partitions
        parts += ["## By slots or by width", markdown.table(partition_rows(costs)), partition_words(costs)]
        memory = plans[0].config.model.sites[0].config
        about = {"cores": memory.address.weights_per_read, "blocks": memory.num_blocks}
        parts.append(_PARTITION.format(tokens=tokens, access=hardware.access_bytes, **about))
    if hardware.notes:
        parts += [f"## Rates of {hardware.name}", "\n".join(f"- {note}" for note in hardware.notes)]
    made = {name: value for name, value in study.environment.items() if name not in _NOT_OF_A_PLAN}
    parts += ["## How this was made", markdown.listing(made)]
    return "\n\n".join(parts) + "\n"


def byte_rows(plans: Sequence[Plan], hardware: Hardware) -> list[markdown.Row]:
    """Returns the bytes that a device holds, by kind, and whether they fit."""
    held = {plan.name: plan.bytes for plan in plans}

    def row(name: str, of: Mapping[str, object]) -> markdown.Row:
        return {"bytes per device": name, **of}

    rows = [
        row(words, {name: getattr(of, field) for name, of in held.items()}) for field, words in _HELD.items()
    ]
    if any(of.background for of in held.values()):
        rows.append(row("background of selected rows", {name: of.background for name, of in held.items()}))
    if any(of.on_host for of in held.values()):
        on_host = {name: of.on_host for name, of in held.items()}
        rows.append(row("tables and moments in the host's memory", on_host))
    rows.append(row("total", {name: of.total for name, of in held.items()}))
    rows.append(row(f"memory of {hardware.name}", dict.fromkeys(held, round(hardware.memory_bytes))))
    rows.append(row("fits", {name: fits(of, hardware) for name, of in held.items()}))
    return rows


def fits(held: DeviceBytes, hardware: Hardware) -> bool:
    """Tells whether a device has enough memory for the bytes."""
    return held.total <= hardware.memory_bytes


def traffic_rows(traffic: Sequence[Traffic]) -> list[markdown.Row]:
    """Returns the collectives of a step by purpose."""
    rows: list[markdown.Row] = []
    for row in traffic:
        compiled = row.compiled_bytes
        times = "by data" if row.times is None and compiled is not None else markdown.cell(row.times)
        rows.append(
            {
                "purpose": row.purpose,
                "kind": row.kind,
                "axes": " × ".join(row.axes),
                "group": row.group_size,
                "times": times,
                "compiled, bytes": compiled,
                "formula, bytes": None if row.formula_bytes is None else round(row.formula_bytes),
                "compiled / formula": compiled / row.formula_bytes
                if compiled and row.formula_bytes
                else None,
            }
        )
    return rows


def time_rows(plans: Sequence[Plan]) -> list[markdown.Row]:
    """Returns the parts of a step on one device, with their amounts and times in every plan."""
    keys = dict.fromkeys((part.resource, part.name) for plan in plans for part in plan.estimate.parts)
    rows: list[markdown.Row] = []
    for resource, name in keys:
        row: markdown.Row = {"part": name, "resource": resource}
        row["unit"] = "TFLOP" if resource == "compute" else "GB"
        for plan in plans:
            found = (p for p in plan.estimate.parts if (p.resource, p.name) == (resource, name))
            part: TimePart | None = next(found, None)
            scale = _TERA if resource == "compute" else _GIGA
            row[plan.name] = part and part.amount / scale
            row[f"{plan.name}, ms"] = part and part.seconds / _MILLI
        rows.append(row)
    return rows


def bound_rows(plans: Sequence[Plan]) -> list[markdown.Row]:
    """Returns the two bounds of the time of a step, for every plan."""
    rows: list[markdown.Row] = []
    for plan in plans:
        estimate, busy = plan.estimate, plan.estimate.by_resource
        rows.append(
            {
                "plan": plan.name,
                "all overlapped, ms": estimate.overlapped / _MILLI,
                "nothing overlapped, ms": estimate.sequential / _MILLI,
                "tokens/s, at most": round(estimate.tokens / estimate.overlapped),
                "tokens/s, nothing overlapped": round(estimate.tokens / estimate.sequential),
                "busiest": max(busy, key=lambda resource: busy[resource]),
            }
        )
    return rows


def partition_rows(costs: Costs) -> list[markdown.Row]:
    """Returns a row per P: the bytes that each way sends, and its time."""
    rows: list[markdown.Row] = []
    for parts, ways in costs.items():
        row: markdown.Row = {"P": parts}
        row |= {f"{TITLES[way]}, MB": ways[way].sent / 1e6 if way in ways else None for way in WAYS}
        row |= {f"{TITLES[way]}, ms": ways[way].seconds / _MILLI if way in ways else None for way in WAYS}
        rows.append(row)
    return rows


def partition_words(costs: Costs) -> str:
    """Says which way of splitting a table is cheaper, and from which P on."""
    words = [verdict(costs)]
    for way, other in (("paper_number_wise", "slots"), ("paper_number_wise", "width"), ("slots", "width")):
        first = crossover(costs, way, other, lambda cost: cost.sent)
        if first is not None:
            words.append(f"`{TITLES[way]}` sends less than `{TITLES[other]}` from P = {first} on.")
    return " ".join(words)


def write(path: pathlib.Path, text: str, study: PlanStudy) -> None:
    """Writes the document, and the study beside it as `.json`."""
    path.write_text(text, encoding="utf-8")
    study.save(path.with_suffix(".json"))


def redraw(path: pathlib.Path) -> None:
    """Writes and prints the document of the study that `write` left beside it.

    Raises:
        UserError: there is none.
    """
    text = render(PlanStudy.load(path.with_suffix(".json")))
    path.write_text(text, encoding="utf-8")
    print(text)
