"""The tables of `count`: what presets cost, and how far that is from what was published of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ultramem_jax.accounting import bytes_per_token, count_parameters, flops_per_token
from ultramem_jax.config import ModelConfig
from ultramem_jax.presets import preset
from ultramem_jax.presets.published import PUBLISHED, Published, rounding

_UNITS = ("", " k", " M", " G", " T")


@dataclass(frozen=True)
class Difference:
    """One published figure beside the count of our config."""

    model: str
    quantity: str
    published: float
    rounding: float
    """Half a unit of the last printed digit."""
    ours: int
    source: str

    @property
    def relative(self) -> float:
        """How much more we count, as a share of the published figure."""
        return (self.ours - self.published) / self.published

    @property
    def is_rounding(self) -> bool:
        """Whether our number, printed with as many digits, could be the published one."""
        return abs(self.ours - self.published) <= self.rounding


def differences(name: str, config: ModelConfig, published: Published) -> list[Difference]:
    """What was published of a model, quantity by quantity, beside the count of `config`.

    Counts follow the convention of the source: with embeddings and gains, or without
    (`Published.counts_embeddings`).
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
        Difference(name, quantity, float(figure), float(rounding(figure)), ours, published.source)
        for quantity, (figure, ours) in pairs.items()
        if figure is not None
    ]


def count_rows(
    configs: Mapping[str, ModelConfig], batch_tokens: int, seq_len: int | None = None
) -> list[dict[str, object]]:
    """One row per model: parameters, and FLOPs and bytes per token.

    Args:
        configs: models by name.
        batch_tokens: tokens of the step whose bytes are counted.
        seq_len: S, for the attention scores among all FLOPs; None leaves them out.
    """
    rows: list[dict[str, object]] = []
    for name, config in configs.items():
        parameters, flops = count_parameters(config), flops_per_token(config, seq_len)
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
                f"bytes at B = {batch_tokens:,}": round(read.per_token),
                "sparse bytes": round(read.sparse / batch_tokens),
            }
        )
    return rows


def count_table(names: Sequence[str], batch_tokens: int) -> str:
    """What presets cost, as a table in Markdown. Embeddings and gains are counted.

    Args:
        names: presets.
        batch_tokens: B of the bytes.

    Raises:
        UserError: an unknown preset.
    """
    rows = count_rows({name: preset(name) for name in names}, batch_tokens)
    return _table(
        [{key: v if isinstance(v, str) else _short(v) for key, v in row.items()} for row in rows], 1
    )


def published_table(names: Sequence[str]) -> str:
    """Presets beside what was published of them, in Markdown; empty if that is nothing.

    Args:
        names: presets.

    Raises:
        UserError: an unknown preset.
    """
    rows: list[dict[str, str]] = []
    for name in names:
        config = preset(name)
        for d in differences(name, config, PUBLISHED[name]) if name in PUBLISHED else ():
            share = f"{d.relative:+.2%}" + (" (rounding)" if d.is_rounding else "")
            rows.append(
                {
                    "model": d.model,
                    "quantity": d.quantity,
                    "source": d.source,
                    "published": _printed(d.published, d.rounding),
                    "ours": _short(d.ours),
                    "difference": share,
                }
            )
    return _table(rows, 3)


def _short(number: object) -> str:
    """A count with five digits and its unit: 1.8586 G. Small ones as they are."""
    assert isinstance(number, int)
    power = min((len(str(number)) - 1) // 3, len(_UNITS) - 1)
    return str(number) if power == 0 else f"{number / 1000**power:#.5g}{_UNITS[power]}"


def _printed(figure: float, half_unit: float) -> str:
    """A published figure in the unit of our counts, with the digits it was printed with."""
    power = min((len(str(int(figure))) - 1) // 3, len(_UNITS) - 1)
    decimals = max(len(str(round(1000**power / (2 * half_unit)))) - 1, 0)
    return f"{figure / 1000**power:.{decimals}f}{_UNITS[power]}"


def _table(rows: list[dict[str, str]], left: int) -> str:
    """Rows as Markdown in aligned columns, `left` of them to the left and the others to the right."""
    if not rows:
        return ""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    rule = ["-" * (w if i < left else w - 1) + ("" if i < left else ":") for i, w in enumerate(widths)]

    def line(texts: list[str]) -> str:
        padded = [
            t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(line(texts) for texts in [cells[0], rule, *cells[1:]])
