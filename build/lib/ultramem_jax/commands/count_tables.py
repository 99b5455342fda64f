"""Makes the tables of `count`: the costs of presets, and their differences from published counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ultramem_jax.accounting import bytes_per_token, count_parameters, flops_per_token
from ultramem_jax.config import ModelConfig
from ultramem_jax.presets import INFERRED, preset
from ultramem_jax.presets.published import PUBLISHED, Printed, Published
from ultramem_jax.reporting import markdown

LEGEND = "* shapes in part inferred; --notes says which"
"""Explains the mark behind a model's name."""
_MARK = " *"
_UNITS = ("", " k", " M", " G", " T")


@dataclass(frozen=True)
class Comparison:
    """Holds one published count beside the count of our config."""

    model: str
    quantity: str
    published: Printed
    ours: int
    source: str

    @property
    def relative(self) -> float:
        """Returns (our count - published count) / published count."""
        return (self.ours - self.published.value) / self.published.value

    @property
    def is_rounding(self) -> bool:
        """Tells whether our count, printed with as many digits, could be the published one."""
        return abs(self.ours - self.published.value) <= self.published.rounding


def compare_counts(name: str, config: ModelConfig, published: Published) -> list[Comparison]:
    """Compares the published counts of a model with the counts of `config`, quantity by quantity.

    Counts follow the convention of the source: with embeddings and gains, or without
    (`Published.counts_embeddings`).

    Args:
        name: name of the model.
        config: our config of the model.
        published: the published counts; quantities that it lacks are left out.
    """
    parameters, flops = count_parameters(config), flops_per_token(config)
    whole = published.counts_embeddings
    pairs = {
        "total params": (published.total_params, parameters.total if whole else parameters.paper_total),
        "dense params": (published.dense_params, parameters.dense if whole else parameters.paper_dense),
        "sparse params": (published.sparse_params, parameters.sparse),
        "active params": (published.active_params, parameters.active_total if whole else parameters.active),
        "FLOPs/token": (published.flops, flops.paper),
    }
    return [
        Comparison(name, quantity, printed, ours, published.source)
        for quantity, (printed, ours) in pairs.items()
        if printed is not None
    ]


def count_rows(configs: Mapping[str, ModelConfig], batch_tokens: int) -> list[markdown.Row]:
    """Returns a row per model: parameters, FLOPs without attention scores, and bytes per token.

    Args:
        configs: models by name.
        batch_tokens: tokens of the step whose bytes are counted.
    """
    rows: list[markdown.Row] = []
    for name, config in configs.items():
        parameters, flops = count_parameters(config), flops_per_token(config)
        read = bytes_per_token(config, batch_tokens)
        rows.append(
            {
                "model": name,
                "dense params": parameters.dense,
                "sparse params": parameters.sparse,
                "total params": parameters.total,
                "active params": parameters.active_total,
                "FLOPs (paper)": flops.paper,
                "FLOPs (all)": flops.total,
                f"bytes/token, B = {batch_tokens:,}": round(read.per_token),
                "of these sparse": round(read.sparse / batch_tokens),
            }
        )
    return rows


def count_table(names: Sequence[str], batch_tokens: int) -> str:
    """Returns the costs of presets as a table in Markdown; embeddings and gains are counted.

    Args:
        names: names of presets.
        batch_tokens: tokens of the step whose bytes are counted.

    Raises:
        UserError: an unknown preset.
    """
    rows = count_rows({_marked(name): preset(name) for name in names}, batch_tokens)
    short = [{key: _short(v) if isinstance(v, int) else v for key, v in row.items()} for row in rows]
    return markdown.table(short, left=["model"])


def published_table(names: Sequence[str]) -> str:
    """Returns presets beside their published counts, in Markdown; empty if nothing is published.

    Args:
        names: names of presets.

    Raises:
        UserError: an unknown preset.
    """
    rows: list[markdown.Row] = []
    for name in names:
        config = preset(name)
        for c in compare_counts(name, config, PUBLISHED[name]) if name in PUBLISHED else ():
            rows.append(
                {
                    "model": _marked(c.model),
                    "quantity": c.quantity,
                    "source": c.source,
                    "published": str(c.published),
                    "ours": f"{c.ours / c.published.scale:#.5g} {c.published.unit}",
                    "difference": f"{c.relative:+.2%}" + (" (rounding)" if c.is_rounding else ""),
                }
            )
    return markdown.table(rows, left=["model", "quantity", "source"]) if rows else ""


def _marked(name: str) -> str:
    """Returns the name of a model with a mark if its shapes are in part inferred."""
    return name + _MARK * (name in INFERRED)


def _short(number: int) -> str:
    """Writes a count with five digits and a unit, such as 1.8586 G; counts below 1,000 stay as they are."""
    power = min((len(str(number)) - 1) // 3, len(_UNITS) - 1)
    return str(number) if power == 0 else f"{number / 1000**power:#.5g}{_UNITS[power]}"
