"""Holds the published size, compute and quality of the presets and of the grids of the ladder.

Numbers keep the digits and the unit of their source, because a difference below half a unit of the last digit
is rounding. Sources are tables 1, 2 and 3 of UltraMem (arXiv 2411.12364), the open models of UltraMemV2
(arXiv 2508.18756), and OLMoE (arXiv 2409.02060).
"""

from dataclasses import dataclass
from decimal import Decimal

_UNITS = {"M": 10**6, "B": 10**9, "G": 10**9}


@dataclass(frozen=True)
class Printed:
    """Holds a count as its source prints it: 0.15 B has one digit less than 150 M."""

    digits: str
    """Digits of the count, as printed."""
    unit: str
    """Unit of the count: `M`, `B` or `G`. A billion parameters is a B in some tables and a G in others."""

    def __str__(self) -> str:
        return f"{self.digits} {self.unit}"

    @property
    def scale(self) -> int:
        """Returns the value of one unit, such as 10⁶ for M."""
        return _UNITS[self.unit]

    @property
    def value(self) -> float:
        """Returns the count as a number."""
        return float(Decimal(self.digits) * self.scale)

    @property
    def rounding(self) -> float:
        """Returns half a unit of the last digit, by which the true count may differ from `value`."""
        exponent = Decimal(self.digits).as_tuple().exponent
        assert isinstance(exponent, int), "a published count is finite"
        return float(Decimal(5).scaleb(exponent - 1) * self.scale)


@dataclass(frozen=True)
class Published:
    """Holds the published numbers of one model. A number that is not published is None."""

    source: str
    """Paper and table."""
    counts_embeddings: bool = False
    """True if counts of parameters include embeddings and gains: False for the UltraMem paper, True for
    OLMoE."""
    total_params: Printed | None = None
    """All parameters."""
    dense_params: Printed | None = None
    """Dense parameters: all but the sparse ones."""
    sparse_params: Printed | None = None
    """Sparse parameters: tables, or all experts."""
    active_params: Printed | None = None
    """Active parameters of a token: all but the tables and the experts that it does not visit."""
    flops: Printed | None = None
    """FLOPs of a token's forward pass without embeddings: two per dense weight."""
    train_loss: Decimal | None = None
    """Training loss, nats per token."""
    val_loss: Decimal | None = None
    """Validation loss on C4, nats per token."""
    eval_loss: Decimal | None = None
    """Loss on the evaluation set of the UltraMemV2 paper, nats per token."""
    tasks_average: Decimal | None = None
    """Mean score of the ten tasks of table 1, percent."""

    def results(self) -> str:
        """Returns the losses and the score in a sentence; empty if there are none."""
        losses = {
            "training": self.train_loss,
            "C4 validation": self.val_loss,
            "evaluation": self.eval_loss,
        }
        told = [f"{name} loss {loss}" for name, loss in losses.items() if loss is not None]
        words = [" and ".join(told) + " nats per token"] if told else []
        if self.tasks_average is not None:
            words.append(f"{self.tasks_average} % on average over ten tasks")
        return f"Published results: {', '.join(words)}." if words else ""


def _table_1(params: str, flops: str, val_loss: str, tasks_average: str) -> Published:
    """Returns a row of table 1, given billions (B) of parameters and GFLOPs."""
    return Published(
        source="UltraMem, table 1",
        total_params=Printed(params, "B"),
        flops=Printed(flops, "G"),
        val_loss=Decimal(val_loss),
        tasks_average=Decimal(tasks_average),
    )


def _table_2(train_loss: str, val_loss: str, dense: str, sparse: str, flops: str) -> Published:
    """Returns a row of table 2, given millions (M) of dense and G of sparse parameters, and MFLOPs."""
    return Published(
        source="UltraMem, table 2",
        dense_params=Printed(dense, "M"),
        sparse_params=Printed(sparse, "G"),
        flops=Printed(flops, "M"),
        train_loss=Decimal(train_loss),
        val_loss=Decimal(val_loss),
    )


def _open_model(eval_loss: str) -> Published:
    """Returns an open model of the UltraMemV2 paper; its name gives its two counts."""
    return Published(
        source="UltraMemV2, open models",
        counts_embeddings=True,
        active_params=Printed("227", "M"),
        total_params=Printed("1.2", "B"),
        eval_loss=Decimal(eval_loss),
    )


_LADDER = {
    "ladder-01-pkm": _table_2("2.604", "2.828", "173.01", "1.534", "346.06"),
    "ladder-02-rm-softmax": _table_2("2.570", "2.822", "173.01", "1.534", "346.06"),
    "ladder-03-half-vdim": _table_2("2.556", "2.800", "178.47", "1.529", "356.98"),
    "ladder-04-share-query": _table_2("2.560", "2.803", "173.46", "1.529", "346.96"),
    "ladder-05-split-skip": _table_2("2.554", "2.788", "161.64", "1.536", "323.32"),
    "ladder-06-query-key-ln": _table_2("2.553", "2.789", "161.64", "1.536", "323.54"),
    "ladder-07-ive": _table_2("2.544", "2.772", "172.37", "1.536", "344.98"),
    "ladder-08-tdqkr": _table_2("2.538", "2.764", "172.37", "1.536", "344.98"),
    "ladder-09-mcs": _table_2("2.521", "2.761", "172.37", "1.536", "344.98"),
    "ladder-10-improved-init": _table_2("2.518", "2.758", "172.37", "1.536", "344.98"),
    "ladder-11-value-lr": _table_2("2.494", "2.736", "172.37", "1.536", "344.98"),
    "ladder-12-query-conv": _table_2("2.493", "2.736", "172.38", "1.536", "345.02"),
}

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
    **_LADDER,
    "pkm-151m-x10": _LADDER["ladder-01-pkm"],
    "olmoe-227m-1.2b": _open_model("2.845"),
    "memory-plus-227m-1.2b": _open_model("2.920"),
    "ultramem-227m-1.2b": _open_model("2.885"),
    "ultramem-v2-227m-1.2b": _open_model("2.853"),
    "engram-27b-table": Published(source="Engram, Engram-27B", sparse_params=Printed("5.7", "B")),
    "olmoe-1b-7b": Published(
        source="OLMoE",
        counts_embeddings=True,
        active_params=Printed("1.28", "B"),
        total_params=Printed("6.92", "B"),
    ),
}
"""Published numbers by preset. The memory models at 1B/7B have no entry, because we found no numbers."""

TABLE_3 = {
    "ive-e4": Decimal("-0.017"),
    "ive-e9": Decimal("-0.025"),
    "ive-e16": Decimal("-0.027"),
    "tdqkr-r2": Decimal("-0.008"),
    "tdqkr-r3": Decimal("-0.0084"),
    "tdqkr-r4": Decimal("-0.0082"),
    "mcs-h2": Decimal("-0.003"),
    "mcs-h4": Decimal("0.001"),
    "mcs-h8": Decimal("0.006"),
}
"""Change of the C4 validation loss from the base of a grid, nats per token, by `ladder.GridPoint.name`."""
