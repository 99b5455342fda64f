"""Describes audits in Markdown: a table of all, and what was found in each with its line of source."""

from collections.abc import Sequence

from ultramem_jax.planning.audit import Audit, Limits
from ultramem_jax.planning.findings import CONTENDED, Finding
from ultramem_jax.reporting import markdown

_MEGA = 1e6
_KINDS = {
    "table_copies": "copies of tables",
    "sorts": "sorts",
    "scatters": "scatters",
    "solvers": "solvers",
    "custom_calls": "custom calls",
    "dense_ragged": "dense expansions of ragged products",
    "host_transfers": "transfers to the host",
    "unbounded_loops": "loops of unknown length",
    "padded": "arrays padded to twice their size and more",
}
_MOST_LINES = 12
"""Most findings of a kind that are listed; the record has all."""


def document(audits: Sequence[Audit], limits: Limits) -> str:
    """Returns the document of audits: the summary, the limits that are broken, and the findings."""
    parts = [
        "# Audits",
        "What the compilers of accelerators make of the programs, without the accelerators: written by "
        "`ultramem audit`, explained in [the guide](../../../docs/guides/accelerators.md). Bytes are of one "
        "device.",
        markdown.table(summary_rows(audits, limits)),
    ]
    for one in audits:
        parts.append(f"## {title(one)}")
        parts.append(details(one, limits))
    return "\n\n".join(parts) + "\n"


def title(one: Audit) -> str:
    """Names a case in words."""
    words = {"train": "training", "decode": "decoding"}
    return f"{one.case.name}, {words[one.case.program]}, {one.case.target}"


def summary_rows(audits: Sequence[Audit], limits: Limits) -> list[markdown.Row]:
    """Returns a row per audit, with its verdict."""
    rows: list[markdown.Row] = []
    for one in audits:
        found = one.findings
        atomic = sum(scatter.what.startswith(CONTENDED) for scatter in found.scatters)
        rows.append(
            {
                "model": one.case.name,
                "program": one.case.program,
                "layers": one.case.layers,
                "target": one.case.target,
                "verdict": "broken" if one.broken(limits) else "holds",
                "arguments, MB": round(one.arguments / _MEGA),
                "of it padding, MB": round(one.argument_padding / _MEGA),
                "temporaries, MB": round(one.temporaries / _MEGA),
                "derived, MB": round(one.expected / _MEGA),
                "ratio": round(one.temporaries / max(one.expected, 1), 2),
                "new results, kB": round(one.not_aliased / 1e3),
                "kernels": found.kernels,
                "copies of tables": len(found.table_copies),
                "sorts of rows": sum(sort.width > limits.sorted_row_width for sort in found.sorts),
                "other sorts": sum(sort.width <= limits.sorted_row_width for sort in found.sorts),
                "scatters": len(found.scatters) - atomic,
                "atomic": atomic,
                "solvers": len(found.solvers),
                "ragged, dense": len(found.dense_ragged),
                "to the host": len(found.host_transfers),
                "compiling, s": round(one.seconds),
            }
        )
    return rows


def details(one: Audit, limits: Limits) -> str:
    """Describes one audit: its broken limits, its bytes, its collectives and its findings."""
    config = one.case.config
    shape = (
        f"batch {config.train.batch_size} × {config.data.seq_len} tokens"
        if one.case.program == "train"
        else f"batch {config.train.batch_size}, {one.case.cache_length:,} cache positions"
    )
    layers = f"{one.case.layers} layers" + (", scanned" if config.model.scan_layers else "")
    remat = f"; remat {config.train.remat}" if config.train.remat != "none" else ""
    lines = [f"{one.compiler}; {shape}; {layers}; {config.model.dtype}{remat}."]
    lines += [f"- **broken** {line}" for line in one.broken(limits)]
    parts = ["\n".join(lines)]
    expected: list[markdown.Row] = [
        {"temporaries": name, "MB": round(number / _MEGA, 1)}
        for name, number in one.expected_temporaries.items()
        if number
    ]
    parts.append(markdown.table(expected))
    if one.collectives:
        sent: list[markdown.Row] = [
            {"collective": name, "MB": round(number / _MEGA, 2)} for name, number in one.collectives.items()
        ]
        parts.append(markdown.table(sent))
    rows: list[markdown.Row] = []
    for kind, name in _KINDS.items():
        found: Sequence[Finding] = getattr(one.findings, kind)
        for finding in sorted(found, key=lambda finding: -finding.times)[:_MOST_LINES]:
            row: markdown.Row = {"found": name, "what": finding.what, "times": finding.times}
            rows.append(row | {"source": finding.source})
        if len(found) > _MOST_LINES:
            rows.append({"found": name, "what": f"and {len(found) - _MOST_LINES} more"})
    parts.append(markdown.table(rows))
    return "\n\n".join(parts)
