"""Makes the report of `open_models` from its measurements."""

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from decimal import Decimal

from experiments.common.timing import times_as_fast
from experiments.open_models import figures
from experiments.open_models.records import DTYPES, OURS, Continuation, Quality, Study
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.markdown import Row

_MEGA, _GIGA = 1e6, 1e9
_PEER = "transformers"
"""Library that the aims compare with."""
_AIMS = {"prefill": 1 / 1.3, "decode": 1.0}
"""Least speed over that of `transformers` that is aimed at."""


def write(study: Study, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the report (`.md`), the study (`.json`) and, with speeds, the figure.

    Args:
        study: the measurements.
        folder: folder of the files; it is made.

    Returns:
        The paths; the report comes first.
    """
    raw = study.save(folder / f"{study.stem}.json")
    drawn = []
    if study.speeds:
        drawn.append(figures.plot_speeds(study, folder / f"{study.stem}_speed.png"))
    text = folder / f"{study.stem}.md"
    text.write_text(report(study), encoding="utf-8")
    return [text, raw, *drawn]


def report(study: Study) -> str:
    """Returns the report as Markdown; parts that were not measured have no section."""
    parts = [f"# {study.model.name}: an open model, measured", _about(study)]
    if study.speeds:
        parts += ["## Speed", *_speed(study)]
    if study.qualities:
        parts += ["## Bits per byte", *_quality(study)]
    if study.continuations:
        parts += ["## Greedy continuations", *_continuations(study.continuations)]
    parts += ["## Where this was measured", markdown.listing(study.environment | study.peers)]
    return "\n\n".join(parts) + "\n"


def speed_rows(study: Study, *, decode: bool) -> list[Row]:
    """Returns a row per program and dtype; ratios compare with ours of the same dtype."""
    rows: list[Row] = []
    for speed in study.speeds:
        seconds = speed.decode if decode else speed.prefill
        rates = study.tokens_per_second(seconds, decode)
        ours = study.beside(speed)
        row: Row = {
            "program": speed.program,
            "weights": speed.dtype,
            "tokens/s": statistics.median(rates),
            "range": markdown.interval(min(rates), max(rates)),
            "× ours": ours and times_as_fast(seconds, ours.decode if decode else ours.prefill),
        }
        if decode:
            row["MB of weights"] = round(speed.weight_bytes / _MEGA)
            row["GB/s"] = speed.weight_bytes * statistics.median(rates) / _GIGA
        rows.append(row)
    return rows


def aim_rows(study: Study) -> list[Row]:
    """Returns a row per aim and dtype: our speed over that of `transformers`, beside the least aimed at."""
    rows: list[Row] = []
    for dtype in DTYPES:
        ours, theirs = study.speed(OURS, dtype), study.speed(_PEER, dtype)
        for kind, least in _AIMS.items() if ours and theirs else ():
            ratio = times_as_fast(getattr(ours, kind), getattr(theirs, kind))
            rows.append(
                {
                    "aim": kind,
                    "weights": dtype,
                    f"times as fast as {_PEER}": ratio,
                    "least": Decimal(f"{least:.2f}"),
                    "met": ratio >= least,
                }
            )
    return rows


def agreement_rows(study: Study) -> list[Row]:
    """Returns a row per program and dtype: how far its results are from ours in float32."""
    return [
        {
            "program": speed.program,
            "weights": speed.dtype,
            "difference of logits": speed.difference,
            "equal greedy tokens": speed.same_tokens,
        }
        for speed in study.speeds
    ]


def quality_rows(study: Study) -> list[Row]:
    """Returns a row per model, with a column of bits per byte for each text."""
    by_model: dict[str, list[Quality]] = {}
    for quality in study.qualities:
        by_model.setdefault(quality.model, []).append(quality)
    rows: list[Row] = []
    for model, qualities in by_model.items():
        row: Row = {
            "model": model,
            "trained on": qualities[0].trained_on,
            "parameters": qualities[0].parameters,
            "context": qualities[0].context,
        }
        for quality in qualities:
            row[f"{quality.text}, bits/byte"] = Decimal(f"{quality.bits_per_byte:.4f}")
        for quality in qualities:
            row[f"{quality.text}, bytes/token"] = quality.num_bytes / quality.tokens
        rows.append(row)
    return rows


def _about(study: Study) -> str:
    model = study.model
    digest = f", sha256 `{model.sha256}`" if model.sha256 else ""
    return (
        f"`{model.name}`: {model.parameters / _MEGA:.1f} M parameters, {model.num_bytes / _MEGA:.1f} MB"
        f"{digest}. Loaded by `ultramem_jax.interop.open_models`, without the network."
    )


def _speed(study: Study) -> Iterable[str]:
    settings = study.settings
    yield (
        f"One sequence: a prompt of {settings.prompt_tokens} tokens up to the next token (prefill), then "
        f"{settings.new_tokens} greedy tokens one by one (decoding). {settings.threads} CPU cores each. All "
        f"programs in turns, one at a time; rounds: {len(study.speeds[0].prefill)}. Medians; ratios "
        "are medians of the ratios of a round. Above 1 is faster than ours."
    )
    if aims := aim_rows(study):
        yield markdown.table(aims)
    yield "### Prefill"
    yield markdown.table(speed_rows(study, decode=False))
    yield "### Decoding"
    yield markdown.table(speed_rows(study, decode=True))
    yield f"![tokens per second of prefill and decoding]({study.stem}_speed.png)"
    for program, reason in study.absent.items():
        yield f"`{program}` was not timed: {reason}."
    yield " ".join(_about_programs(study))
    yield "### Do they compute the same?"
    yield markdown.table(agreement_rows(study))
    yield (
        "Difference of logits: the largest after the prompt to ours in float32, over the standard deviation "
        f"of ours. Equal tokens: the first of the {settings.new_tokens + 1} greedy ones that are those of "
        "ours in float32; after the first other token, programs continue other texts."
    )


def _about_programs(study: Study) -> Iterable[str]:
    programs = {speed.program for speed in study.speeds}
    yield f"`{OURS}` reads prompts {study.settings.prefill_chunk} tokens at a time and caches float32."
    if _PEER in programs:
        yield (
            f"`{_PEER}` computes in PyTorch, on weights that `open_models.save` wrote, with its default "
            "attention and cache, and without the overhead of its `generate`."
        )
    others = [speed for speed in study.speeds if speed.dtype not in DTYPES]
    if others:
        yield (
            f"`{others[0].program}` reads the file as it is, in {others[0].dtype}: "
            f"{others[0].weight_bytes / _MEGA:.0f} MB a token. It is compared with ours in bfloat16."
        )
    yield "GB/s: all weights, once for each token."


def _quality(study: Study) -> Iterable[str]:
    yield markdown.table(quality_rows(study))
    yield (
        "Lower is better: bits of all tokens over the bytes of the text. A token is predicted from those "
        "before it in its document: from at least half of the model's context, in windows that overlap by a "
        "half. Every document begins after the tokenizer's own first tokens, and its end is not predicted. "
        "What open models were trained on may hold these texts."
    )
    yield "\n".join(
        f"- {text.name}: {text.num_bytes:,} bytes, documents: {text.documents}, sha256 `{text.sha256}`."
        for text in study.texts
    )


def _continuations(continuations: Sequence[Continuation]) -> Iterable[str]:
    yield "Prompts are plain text, without a chat template. The arrow stands where the prompt ends."
    for continuation in continuations:
        text = f"{continuation.prompt}⟶{continuation.text}"
        yield "\n".join(["~~~text", *text.split("\n"), "~~~"])
