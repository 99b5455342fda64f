"""Builds the ablation of the UltraMem paper (arXiv 2411.12364, table 2): from PKM to UltraMem in 11 steps.

Each rung makes one change to the rung before it. The same code builds the ladder at two scales: `151m` (the
paper's shapes, whose counts agree with the published ones) and `tiny` (shapes in proportion, for the CPU of a
laptop). It also builds the grids of table 3, which vary one number of a change. The published results of the
rungs and of the grids are in `presets.published`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.field_types import FieldValue
from ultramem_jax.errors import choice
from ultramem_jax.presets import families, tiny, ultramem_paper
from ultramem_jax.presets.published import PUBLISHED


@dataclass(frozen=True)
class Rung:
    """Describes one row of table 2 by its change to the rung before."""

    name: str
    """Name of the rung's preset."""
    change: str
    """Name of the change in the paper."""
    switches: Mapping[str, FieldValue]
    """Fields of `MemoryConfig` that the change sets at every scale. Sizes that change with them are in
    `_SHAPES`."""
    inferred: str = ""
    """Details of the change that the paper does not give, besides the sizes."""


LADDER = (
    Rung("ladder-01-pkm", "PKM", {}),
    Rung("ladder-02-rm-softmax", "rm softmax", dict(softmax=False)),
    Rung("ladder-03-half-vdim", "half vdim + proj", dict(project_values=True)),
    Rung("ladder-04-share-query", "share query", dict(share_query=True)),
    Rung("ladder-05-split-skip", "split big mem & skip", {}),
    Rung(
        "ladder-06-query-key-ln",
        "query/key LN",
        dict(norm_query=True, norm_keys=True),
        "RMS norms, as in the authors' code",
    ),
    Rung("ladder-07-ive", "IVE", dict(expansion=4)),
    Rung(
        "ladder-08-tdqkr",
        "TDQKR",
        dict(tucker_rank=2),
        "the ranks split the 500 dimensions of a key: the published count does not grow",
    ),
    Rung("ladder-09-mcs", "MCS", dict(num_cores=2)),
    Rung("ladder-10-improved-init", "improved init", dict(init="paper")),
    Rung("ladder-11-value-lr", "value lr decay", dict(value_lr_multiple=10.0)),
    Rung(
        "ladder-12-query-conv",
        "query conv",
        dict(query_conv_width=4),
        "depthwise and 4 wide: 3·4·1024 weights are the 0.01 M that it adds",
    ),
)
"""Rungs of the ladder, in the order of table 2 of the paper."""

RUNGS = tuple(rung.name for rung in LADDER)
"""Names of the rungs, in the order of `LADDER`."""


@dataclass(frozen=True)
class GridPoint:
    """Describes one config of a grid: its base with one field changed."""

    name: str
    """Name of the config."""
    part: str
    """Name of the grid that the config belongs to."""
    base: str
    """Name of the rung or grid point that the config changes and is compared with."""
    field: str
    """Name of the changed field of `MemoryConfig`."""
    value: int
    """New value of the field."""


GRID = (
    GridPoint("ive-e4", "ive", "ladder-06-query-key-ln", "expansion", 4),
    GridPoint("ive-e9", "ive", "ladder-06-query-key-ln", "expansion", 9),
    GridPoint("ive-e16", "ive", "ladder-06-query-key-ln", "expansion", 16),
    GridPoint("tdqkr-r2", "tdqkr", "ladder-07-ive", "tucker_rank", 2),
    GridPoint("tdqkr-r3", "tdqkr", "ladder-07-ive", "tucker_rank", 3),
    GridPoint("tdqkr-r4", "tdqkr", "ladder-07-ive", "tucker_rank", 4),
    GridPoint("mcs-h2", "mcs", "ladder-08-tdqkr", "num_cores", 2),
    GridPoint("mcs-h4", "mcs", "ladder-08-tdqkr", "num_cores", 4),
    GridPoint("mcs-h8", "mcs", "ladder-08-tdqkr", "num_cores", 8),
    GridPoint("ive-alone", "alone", "ladder-06-query-key-ln", "expansion", 4),
    GridPoint("tdqkr-alone", "alone", "ladder-06-query-key-ln", "tucker_rank", 2),
    GridPoint("mcs-alone", "alone", "tdqkr-alone", "num_cores", 2),
)
"""Points of table 3 of the paper (`ive`, `tdqkr`, `mcs`), and those that its own reviewers missed (`alone`).

The bases of table 3 are inferred: its changes for E 4, r 2 and h 2, -0.017, -0.008 and -0.003, are those of
table 2 from rung 6 to 7, 7 to 8 and 8 to 9.

The points of `alone` change the sixth rung, without the changes that the ladder makes after it. Multi-Core
Scoring adds up Tucker cores, so it needs one: `mcs-alone` has TDQKR but no IVE, and is compared with
`tdqkr-alone`. `ive-alone` is the seventh rung.
"""

GRID_PARTS = tuple(dict.fromkeys(point.part for point in GRID))
"""Names of the grids."""


@dataclass(frozen=True)
class _Shapes:
    """Holds the sizes of one scale."""

    first: ModelConfig
    """Model of the first rung: it has one memory, with values as wide as the model."""
    sizes: Mapping[str, Mapping[str, FieldValue]]
    """Fields of `MemoryConfig` that a rung sets besides its switches, by the name of the rung."""


_SHAPES = {
    "151m": _Shapes(
        first=ultramem_paper.PRESETS["pkm-151m-x10"],
        sizes={
            "ladder-03-half-vdim": dict(value_dim=512, num_keys=1728),
            "ladder-05-split-skip": dict(placement="3:5/6:8/9:11", num_keys=1000, key_dim=500),
        },
    ),
    "tiny": _Shapes(
        first=replace(
            tiny.LAYERS,
            memories={
                "pkm": families.pkm(
                    placement="2:2",
                    # Tables 10 times the layers' 12·L·D² weights, as published.
                    num_keys=248,
                    # About 1/24 of the keys of a side, as in the paper's shapes.
                    top_m=10,
                    num_heads=2,
                    # Keys are 4.9 times as wide as after the split, as published. With these widths the share
                    # of the memory in the dense weights (18 % in rungs 1 and 12, 9 % in rungs 5 and 6) is
                    # near the published share (13 %, 7 %).
                    key_dim=118,
                    value_dim=128,
                )
            },
        ),
        sizes={
            "ladder-03-half-vdim": dict(value_dim=64, num_keys=351),
            # Keys whose width the ranks 2, 3 and 4 divide.
            "ladder-05-split-skip": dict(placement="1:2/3:4", num_keys=248, key_dim=24),
        },
    ),
}

SCALES = tuple(_SHAPES)
"""Names of the scales."""


def ladder(scale: str) -> dict[str, ModelConfig]:
    """Returns the models of the twelve rungs by name, in order.

    Args:
        scale: `151m`, the scale of the paper, or `tiny`.

    Raises:
        UserError: another scale.
    """
    choice("scale", scale, SCALES)
    shapes = _SHAPES[scale]
    models, memory = {}, shapes.first.memory
    assert memory is not None
    for rung in LADDER:
        memory = memory.changed(**rung.switches, **shapes.sizes.get(rung.name, {}))
        models[rung.name] = replace(shapes.first, memories={"ultramem": memory})
    return models


def grid(scale: str) -> dict[str, ModelConfig]:
    """Returns the models of `GRID` by name. Some equal a rung of the ladder, such as `ive-e4`.

    Args:
        scale: `151m` or `tiny`.

    Raises:
        UserError: another scale.
    """
    models = ladder(scale)
    for point in GRID:
        base = models[point.base]
        assert base.memory is not None
        change: dict[str, FieldValue] = {point.field: point.value}
        if point.field == "tucker_rank":
            # The ranks split a key. 3 does not divide 500, so the keys of that point are 501 wide.
            change["key_dim"] = -(-base.memory.value_of("key_dim") // point.value) * point.value
        models[point.name] = replace(base, memories={"ultramem": base.memory.changed(**change)})
    return {point.name: models[point.name] for point in GRID}


PRESETS: dict[str, ModelConfig] = ladder("151m")
"""Rungs at the scale of the paper, by name."""

_LAYERS_NOTE = (
    "Inferred of all rungs: the layers, as in `dense-151m`, with 150.99 M weights; 2 heads; 42 reads a head, "
    "as in the 1.6 B UltraMem. "
)
_ONE_MEMORY_NOTE = (
    "Of the first four: one memory, at layer 6, with keys 2,448 wide. 1224² values of width 1024 are the "
    "1.534 G of rungs 1 and 2; queries and keys, 1024·2·2·2448 + 2·2·1224·2448 weights, are 22.01 M, "
    "published 173.01 - 150.99 = 22.02. 1728² values of width 512 are the 1.529 G of rungs 3 and 4; "
    "1024·2·2·2448 + 2·2·1728·2448 + 512·1024 are 27.47 M, published 178.47 - 150.99 = 27.48; with one query "
    "for both heads they are 22.46 M, published 173.46 - 150.99 = 22.47. "
)
_THREE_MEMORIES_NOTE = (
    "From the fifth on: three memories with keys 500 wide, at a regular interval as in the 1.6 B model. "
    "3·1000² values of width 512 are 1.536 G; 3·(1024·2·500 + 2·2·1000·500 + 512·1024) weights are 10.64 M, "
    "published 161.64 - 150.99 = 10.65. With IVE the keys double and 4·512·1024 weights project: 21.36 M, "
    "published 172.37 - 150.99 = 21.38. "
)
_FLOPS_NOTE = (
    "FLOPs are two per dense weight; the published ones are 0.04 M more in the first five rungs and about "
    "0.24 M more from the sixth on, which is unexplained."
)


def _note(number: int, rung: Rung) -> str:
    """Returns the text of `NOTES` for a rung; numbers count from 1."""
    published = PUBLISHED[rung.name]
    return (
        f"UltraMem paper, table 2, rung {number}, {rung.change!r}. Published: {published.dense_params} dense "
        f"and {published.sparse_params} sparse parameters, {published.flops}FLOPs. "
        + (f"Inferred of the change: {rung.inferred}. " if rung.inferred else "")
        + _LAYERS_NOTE
        + (_ONE_MEMORY_NOTE if number < 5 else _THREE_MEMORIES_NOTE)
        + _FLOPS_NOTE
    )


NOTES: dict[str, str] = {rung.name: _note(number, rung) for number, rung in enumerate(LADDER, 1)}
