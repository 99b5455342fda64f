"""The ablation of the UltraMem paper (arXiv 2411.12364, table 2): Product-Key Memory to UltraMem in 11 steps.

Each rung is the one before it with one change. The same mechanism builds the ladder at two scales, `151m`
(the paper's shapes, whose counts agree with the published ones) and `tiny` (shapes in proportion, for the CPU
of a laptop), and the grids of table 3, which vary one number of a change.
"""

from dataclasses import dataclass, replace
from typing import Any

from ultramem_jax.config import MemoryConfig, ModelConfig
from ultramem_jax.errors import choice
from ultramem_jax.presets import ultramem_paper


@dataclass(frozen=True)
class Rung:
    """One row of table 2: what it changes, and what was published of it."""

    name: str
    change: str
    """The paper's name of it."""
    fields: tuple[str, ...]
    """Fields of `MemoryConfig` that differ from the rung before. Those after the first keep counts equal."""
    train_loss: float
    """Nats per token."""
    val_loss: float
    """Nats per token, C4."""
    dense: float
    """Millions of parameters, embeddings and gains left out."""
    sparse: float
    """Billions of parameters in the tables."""
    flops: float
    """Millions per token, forward."""
    inferred: str = ""
    """What the paper does not say of the change."""


TABLE_2 = (
    Rung("ladder-01-pkm", "PKM", (), 2.604, 2.828, 173.01, 1.534, 346.06),
    Rung("ladder-02-rm-softmax", "rm softmax", ("softmax",), 2.570, 2.822, 173.01, 1.534, 346.06),
    Rung(
        "ladder-03-half-vdim",
        "half vdim + proj",
        ("value_dim", "project_values", "num_keys"),
        2.556,
        2.800,
        178.47,
        1.529,
        356.98,
        "1728² values of width 512, twice the slots, from the counts",
    ),
    Rung("ladder-04-share-query", "share query", ("share_query",), 2.560, 2.803, 173.46, 1.529, 346.96),
    Rung(
        "ladder-05-split-skip",
        "split big mem & skip",
        ("placement", "num_keys", "key_dim"),
        2.554,
        2.788,
        161.64,
        1.536,
        323.32,
        "three memories of 1000² values with keys 500 wide, from the counts; their places, at a regular "
        "interval as in the 1.6 B model",
    ),
    Rung(
        "ladder-06-query-key-ln",
        "query/key LN",
        ("norm_query", "norm_keys"),
        2.553,
        2.789,
        161.64,
        1.536,
        323.54,
        "RMS norms, as in the authors' code",
    ),
    Rung("ladder-07-ive", "IVE", ("expansion",), 2.544, 2.772, 172.37, 1.536, 344.98),
    Rung(
        "ladder-08-tdqkr",
        "TDQKR",
        ("tucker_rank",),
        2.538,
        2.764,
        172.37,
        1.536,
        344.98,
        "the ranks split the 500 dimensions of a key: the published count does not grow",
    ),
    Rung("ladder-09-mcs", "MCS", ("num_cores",), 2.521, 2.761, 172.37, 1.536, 344.98),
    Rung("ladder-10-improved-init", "improved init", ("init",), 2.518, 2.758, 172.37, 1.536, 344.98),
    Rung("ladder-11-value-lr", "value lr decay", ("value_lr_multiple",), 2.494, 2.736, 172.37, 1.536, 344.98),
    Rung(
        "ladder-12-query-conv",
        "query conv",
        ("query_conv_width",),
        2.493,
        2.736,
        172.38,
        1.536,
        345.02,
        "depthwise and 4 wide, from the 0.01 M parameters that it adds",
    ),
)
"""Table 2 of the paper, in its order."""

RUNGS = tuple(rung.name for rung in TABLE_2)


@dataclass(frozen=True)
class GridPoint:
    """One config of a grid: its base with one field changed."""

    name: str
    part: str
    """The grid that it belongs to."""
    base: str
    """The rung, or the point, that it changes and is compared with."""
    field: str
    """Of `MemoryConfig`."""
    value: int
    difference: float | None = None
    """Published change of the validation loss to the base, nats per token."""


GRID = (
    GridPoint("ive-e4", "ive", "ladder-06-query-key-ln", "expansion", 4, -0.017),
    GridPoint("ive-e9", "ive", "ladder-06-query-key-ln", "expansion", 9, -0.025),
    GridPoint("ive-e16", "ive", "ladder-06-query-key-ln", "expansion", 16, -0.027),
    GridPoint("tdqkr-r2", "tdqkr", "ladder-07-ive", "tucker_rank", 2, -0.008),
    GridPoint("tdqkr-r3", "tdqkr", "ladder-07-ive", "tucker_rank", 3, -0.0084),
    GridPoint("tdqkr-r4", "tdqkr", "ladder-07-ive", "tucker_rank", 4, -0.0082),
    GridPoint("mcs-h2", "mcs", "ladder-08-tdqkr", "num_cores", 2, -0.003),
    GridPoint("mcs-h4", "mcs", "ladder-08-tdqkr", "num_cores", 4, 0.001),
    GridPoint("mcs-h8", "mcs", "ladder-08-tdqkr", "num_cores", 8, 0.006),
    GridPoint("ive-alone", "alone", "ladder-06-query-key-ln", "expansion", 4),
    GridPoint("tdqkr-alone", "alone", "ladder-06-query-key-ln", "tucker_rank", 2),
    GridPoint("mcs-alone", "alone", "tdqkr-alone", "num_cores", 2),
)
"""Table 3 of the paper (`ive`, `tdqkr`, `mcs`), and what its reviewers missed (`alone`).

Alone means: on the sixth rung, without the changes that the ladder makes after it. Multi-Core Scoring adds
up Tucker cores and so needs one: `mcs-alone` has TDQKR but no IVE, and is compared with `tdqkr-alone`.
`ive-alone` is the seventh rung.
"""

GRID_PARTS = tuple(dict.fromkeys(point.part for point in GRID))


@dataclass(frozen=True)
class _Shapes:
    """The sizes of one scale. One wide memory, then one of half the width, then several."""

    layers: ModelConfig
    top_m: int
    place: str
    num_keys: int
    key_dim: int
    half_num_keys: int
    places: str
    split_num_keys: int
    split_key_dim: int


_SHAPES = {
    "151m": _Shapes(
        layers=ultramem_paper.PRESETS["dense-151m"],
        top_m=42,
        place="6:6",
        num_keys=1224,
        # Unshared, 2 heads: D·2·2·d_k + 2·2·n·d_k weights are the published 173.01 - 150.99 M.
        key_dim=2448,
        half_num_keys=1728,
        places="3:5/6:8/9:11",
        split_num_keys=1000,
        split_key_dim=500,
    ),
    "tiny": _Shapes(
        layers=ModelConfig(embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=4, mlp_dim=512),
        # About 1 key in 24 of a side, as in the shapes above.
        top_m=10,
        place="2:2",
        # Tables 10 times the layers' 12·L·D² weights, as published.
        num_keys=248,
        # 4.9 times the width after the split, as published. With these widths the memory's part of the dense
        # weights (18 % in rungs 1 and 12, 9 % in rungs 5 and 6) is near the published one (13 %, 7 %).
        key_dim=118,
        half_num_keys=351,
        places="1:2/3:4",
        split_num_keys=248,
        # Divisible by the ranks 2, 3 and 4.
        split_key_dim=24,
    ),
}

SCALES = tuple(_SHAPES)


def ladder(scale: str) -> dict[str, ModelConfig]:
    """The twelve rungs by name, in order.

    Args:
        scale: `151m`, the paper's, or `tiny`.

    Raises:
        UserError: another scale.
    """
    choice("scale", scale, SCALES)
    shapes = _SHAPES[scale]
    width = shapes.layers.embed_dim
    changes: dict[str, dict[str, Any]] = {
        "ladder-01-pkm": {},
        "ladder-02-rm-softmax": dict(softmax=False),
        "ladder-03-half-vdim": dict(value_dim=width // 2, project_values=True, num_keys=shapes.half_num_keys),
        "ladder-04-share-query": dict(share_query=True),
        "ladder-05-split-skip": dict(
            placement=shapes.places, num_keys=shapes.split_num_keys, key_dim=shapes.split_key_dim
        ),
        "ladder-06-query-key-ln": dict(norm_query=True, norm_keys=True),
        "ladder-07-ive": dict(expansion=4),
        "ladder-08-tdqkr": dict(tucker_rank=2),
        "ladder-09-mcs": dict(num_cores=2),
        "ladder-10-improved-init": dict(init="paper"),
        "ladder-11-value-lr": dict(value_lr_multiple=10.0),
        "ladder-12-query-conv": dict(query_conv_width=4),
    }
    memory = MemoryConfig.pkm(
        placement=shapes.place,
        num_keys=shapes.num_keys,
        top_m=shapes.top_m,
        num_heads=2,
        key_dim=shapes.key_dim,
        value_dim=width,
    )
    models = {}
    for name, change in changes.items():
        memory = replace(memory, **change)
        models[name] = replace(shapes.layers, memory=memory)
    return models


def grid(scale: str) -> dict[str, ModelConfig]:
    """The configs of `GRID` by name. Some are a rung of the ladder under another name (`ive-e4`).

    Args:
        scale: `151m` or `tiny`.

    Raises:
        UserError: another scale.
    """
    models = ladder(scale)
    for point in GRID:
        base = models[point.base]
        assert base.memory is not None
        change: dict[str, Any] = {point.field: point.value}
        if point.field == "tucker_rank":
            # The ranks split a key: 3 does not divide 500, so that this one is 501 wide.
            change["key_dim"] = -(-base.memory.key_dim // point.value) * point.value
        models[point.name] = replace(base, memory=replace(base.memory, **change))
    return {point.name: models[point.name] for point in GRID}


PRESETS: dict[str, ModelConfig] = ladder("151m")

_SHAPE_NOTE = (
    "Inferred of all rungs: the layers, as in `dense-151m`; 42 reads a head, as in the 1.6 B UltraMem. Of "
    "the first four: one memory, at layer 6; 2 heads with keys 2,448 wide, since 1024·2·2·2448 weights of "
    "queries and 2·2·1224·2448 of keys are the published 22.0 M beside the layers. The counts agree with the "
    "published ones to 0.02 M (dense parameters) and 0.1 % (FLOPs). From the sixth rung on the published "
    "FLOPs exceed two per dense weight by about 0.24 M, and rungs 7 to 11 come out as 172.36 M."
)

NOTES: dict[str, str] = {
    rung.name: (
        f"UltraMem paper, table 2, rung {number}, {rung.change!r}. Published: validation loss "
        f"{rung.val_loss:.3f}, {rung.dense:.2f} M dense and {rung.sparse:.3f} B sparse parameters, "
        f"{rung.flops:.2f} MFLOPs. "
        + (f"Inferred of the change: {rung.inferred}. " if rung.inferred else "")
        + _SHAPE_NOTE
    )
    for number, rung in enumerate(TABLE_2, 1)
}
