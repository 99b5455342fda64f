"""The published figures of the presets: size, compute, quality.

A figure is a `Decimal`, so that it keeps the digits it was printed with: a difference smaller than half a
unit of the last one (`rounding`) says nothing. Sources are tables 1 and 2 of UltraMem (arXiv 2411.12364), the
open models of UltraMemV2 (arXiv 2508.18756), and OLMoE (arXiv 2409.02060).
"""

from dataclasses import dataclass
from decimal import Decimal

from ultramem_jax.presets.ladder import TABLE_2


@dataclass(frozen=True)
class Published:
    """What was printed of one model; None where nothing was."""

    source: str
    """Paper and table."""
    counts_embeddings: bool = False
    """Whether counts of parameters hold embeddings and gains: in the UltraMem paper no, with OLMoE yes."""
    total_params: Decimal | None = None
    dense_params: Decimal | None = None
    sparse_params: Decimal | None = None
    """Tables, or all experts."""
    active_params: Decimal | None = None
    """Parameters that a token meets: all but the tables and the experts it does not visit."""
    flops: Decimal | None = None
    """Of a token's forward pass, embeddings left out: two per dense weight."""
    train_loss: Decimal | None = None
    """Nats per token; so are the others."""
    val_loss: Decimal | None = None
    """On C4."""
    eval_loss: Decimal | None = None
    """On the UltraMemV2 paper's evaluation set."""
    tasks_average: Decimal | None = None
    """Mean score of the ten tasks of table 1, percent."""


def rounding(figure: Decimal) -> Decimal:
    """Half a unit of the last printed digit: by how much the true number may differ from the figure."""
    exponent = figure.as_tuple().exponent
    assert isinstance(exponent, int), "a published figure is finite"
    return Decimal(5).scaleb(exponent - 1)


def _table_1(params: str, flops: str, val_loss: str, tasks_average: str) -> Published:
    """A row of table 1: B parameters, GFLOPs."""
    return Published(
        source="UltraMem, table 1",
        total_params=Decimal(f"{params}e9"),
        flops=Decimal(f"{flops}e9"),
        val_loss=Decimal(val_loss),
        tasks_average=Decimal(tasks_average),
    )


def _table_2() -> dict[str, Published]:
    """The rungs of the ladder, with the digits that the paper prints."""
    return {
        rung.name: Published(
            source="UltraMem, table 2",
            dense_params=Decimal(f"{rung.dense:.2f}e6"),
            sparse_params=Decimal(f"{rung.sparse:.3f}e9"),
            flops=Decimal(f"{rung.flops:.2f}e6"),
            train_loss=Decimal(f"{rung.train_loss:.3f}"),
            val_loss=Decimal(f"{rung.val_loss:.3f}"),
        )
        for rung in TABLE_2
    }


def _open_model(eval_loss: str) -> Published:
    """An open model of the UltraMemV2 paper: its name gives its two counts."""
    return Published(
        source="UltraMemV2, open models",
        counts_embeddings=True,
        active_params=Decimal("227e6"),
        total_params=Decimal("1.2e9"),
        eval_loss=Decimal(eval_loss),
    )


PUBLISHED: dict[str, Published] = {
    "dense-151m": _table_1("0.15", "0.30", "2.96", "26.77"),
    "moe-151m-2in32": _table_1("2.04", "0.35", "2.63", "31.56"),
    "ultramem-151m-x12": _table_1("2.03", "0.35", "2.67", "28.89"),
    "dense-680m": _table_1("0.68", "1.36", "2.64", "30.42"),
    "moe-680m-2in33": _table_1("8.95", "1.50", "2.39", "33.13"),
    "ultramem-680m-x12": _table_1("8.93", "1.49", "2.37", "35.88"),
    "dense-1.6b": _table_1("1.61", "3.21", "2.49", "34.81"),
    "moe-1.6b-2in34": _table_1("21.36", "3.52", "2.30", "37.14"),
    "ultramem-1.6b-x12": _table_1("21.41", "3.50", "2.24", "40.88"),
    "dense-6.5b": _table_1("6.44", "12.88", "2.30", "41.04"),
    **_table_2(),
    "pkm-151m-x10": _table_2()["ladder-01-pkm"],
    "olmoe-227m-1.2b": _open_model("2.845"),
    "memory-plus-227m-1.2b": _open_model("2.920"),
    "ultramem-227m-1.2b": _open_model("2.885"),
    "ultramem-v2-227m-1.2b": _open_model("2.853"),
    "olmoe-1b-7b": Published(
        source="OLMoE",
        counts_embeddings=True,
        active_params=Decimal("1.28e9"),
        total_params=Decimal("6.92e9"),
    ),
}
"""By preset. The memory models at 1B/7B have no entry: nothing of theirs was published."""
