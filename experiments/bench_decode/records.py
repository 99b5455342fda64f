"""Keeps the measurements of `bench_decode`, in memory and in a file.

Tables and figures are made only from a `DecodeStudy`, so they can be made again without measuring.
"""

import dataclasses
import math
import os
import pathlib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.common import report
from ultramem_jax.accounting import DecodeCost, PartCost
from ultramem_jax.reporting.records import keep_record, kept_record
from ultramem_jax.tree_types import JsonDict

STUDIES = ("batch", "sparsity")
"""Names of the studies: time against the batch size, and against the slots or experts of a model."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention", "cache"),
    "feed_forward": ("feed_forward",),
    "memory": ("memory", "memory_rows"),
    "logits": ("logits",),
}
"""Parts that are timed separately, each with the parts of a `DecodeCost` that it contains."""


@dataclass(frozen=True)
class DecodeRates:
    """Holds measured rates of the machine; each is a median."""

    flops_per_second: dict[str, float]
    """FLOPs per second of a square matrix product, by dtype; a dtype that was not measured is absent.

    Measured by `experiments.common.machine.product_flops_per_second`.
    """
    bytes_per_second: float
    """Bytes read per second, without writing, because a step writes next to nothing.

    Measured by `experiments.common.machine.read_bytes_per_second`.
    """

    @classmethod
    def median(cls, rates: Sequence["DecodeRates"]) -> "DecodeRates":
        """Returns the median of each rate over one or more measurements of the same dtypes."""
        return cls(
            flops_per_second={
                dtype: statistics.median(each.flops_per_second[dtype] for each in rates)
                for dtype in rates[0].flops_per_second
            },
            bytes_per_second=statistics.median(each.bytes_per_second for each in rates),
        )


@dataclass(frozen=True)
class DecodeTiming:
    """Holds the times of one model at one batch, for a step that takes one token of each sequence."""

    study: str
    """Study of the timing, one of `STUDIES`."""
    system: str
    """Name of the system in figures and tables: `dense`, `moe`, `pkm`, `ultramem`, ..."""
    preset: str
    """Preset of the model, or the preset that it is made from."""
    dtype: str
    """Dtype of the served weights."""
    batch: int
    """B, the number of sequences."""
    cache_length: int
    """Cache positions that each sequence attends to."""
    cache_dtype: str
    """Dtype of the cached keys and values."""
    sparse_over_dense: float
    """Parameters of tables or experts over the weights of the dense model's layers.

    It is about 12 for ultramem-151m-x12, and 0 for the dense model.
    """
    parameters: int
    """Number of all parameters."""
    seconds: tuple[float, ...]
    """Seconds of a step, one value per repeat."""
    parts: dict[str, float] | None
    """Median seconds of the step's `PARTS`, each timed separately; None if they were not timed."""
    cost: DecodeCost
    """Least FLOPs and bytes of the step, for the numbers of experts and rows that the timed steps chose."""

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise ValueError(f"study = {self.study!r}: must be one of {', '.join(STUDIES)}")
        if not self.seconds or min(self.seconds) <= 0:
            raise ValueError(f"seconds = {self.seconds!r}: must be times above 0, at least one")
        if unknown := set(self.parts or {}) - set(PARTS):
            raise ValueError(f"parts = {sorted(unknown)}: must be among {', '.join(PARTS)}")

    @property
    def median(self) -> float:
        """Returns the median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Returns the tokens per second of all sequences together."""
        return self.batch / self.median


@dataclass(frozen=True)
class DecodeStudy:
    """Holds all measurements of one machine."""

    machine: dict[str, str]
    """Strings from `describe_environment()`: command, commit, date, CPU cores, versions, devices."""
    rates: DecodeRates
    timings: list[DecodeTiming]
    """Timings, in the order in which systems appear in tables and figures."""

    def __post_init__(self) -> None:
        counts = Counter(
            (t.study, t.system, t.dtype, t.batch, t.cache_length, t.sparse_over_dense) for t in self.timings
        )
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"timings: {twice[0]} is there twice")

    @property
    def device(self) -> str:
        """Returns the kind of the devices, such as `cpu` or `NVIDIA H100 80GB HBM3`, without their number."""
        return report.device_kind(self.machine)

    @property
    def on_cpu(self) -> bool:
        """Tells whether the study ran on a CPU."""
        return report.is_cpu(self.machine)

    @property
    def dtypes(self) -> list[str]:
        """Returns the dtypes that were timed, in the order of the timings."""
        return list(dict.fromkeys(t.dtype for t in self.timings))

    def of(self, study: str, dtype: str | None = None, system: str | None = None) -> list[DecodeTiming]:
        """Returns the timings of a study, sorted by dtype, batch, system and sparsity.

        Args:
            study: one of `STUDIES`.
            dtype: dtype of the weights; None for all.
            system: name of the system; None for all.
        """
        systems = list(dict.fromkeys(t.system for t in self.timings))
        dtypes = self.dtypes
        found = [
            t
            for t in self.timings
            if t.study == study and dtype in (None, t.dtype) and system in (None, t.system)
        ]
        return sorted(
            found,
            key=lambda t: (dtypes.index(t.dtype), t.batch, systems.index(t.system), t.sparse_over_dense),
        )

    def by_system(self, study: str, dtype: str | None = None) -> dict[str, list[DecodeTiming]]:
        """Returns the timings of a study by system, in the order of the systems, sorted as by `of`."""
        systems = dict.fromkeys(t.system for t in self.timings)
        found = {system: self.of(study, dtype, system) for system in systems}
        return {system: timings for system, timings in found.items() if timings}

    def beside(self, timing: DecodeTiming, system: str) -> DecodeTiming | None:
        """Returns the timing of another system in the study `batch` with the same dtype, batch and cache.

        Returns None if there is none.
        """
        return self.at(timing.dtype, timing.batch, system, timing.cache_length)

    def at(self, dtype: str, batch: int, system: str, cache_length: int | None = None) -> DecodeTiming | None:
        """Returns the timing of a system in the study `batch`; None if there is none.

        Args:
            dtype: dtype of the weights.
            batch: number of sequences.
            system: name of the system.
            cache_length: cache positions of a sequence; None for any number.
        """
        found = (t for t in self.of("batch", dtype, system) if t.batch == batch)
        return next((t for t in found if cache_length in (None, t.cache_length)), None)

    def floor(self, timing: DecodeTiming) -> float | None:
        """Returns the least seconds of a step on this machine; None if its dtype has no measured rate."""
        flops = self.rates.flops_per_second.get(timing.dtype)
        return flops and timing.cost.floor(flops, self.rates.bytes_per_second)

    def part_floors(self, timing: DecodeTiming) -> dict[str, float]:
        """Returns the least seconds of the timed parts, by name; empty if its dtype has no measured rate."""
        flops = self.rates.flops_per_second.get(timing.dtype)
        if not flops:
            return {}
        floors = timing.cost.part_floors(flops, self.rates.bytes_per_second)
        return {part: math.fsum(floors[name] for name in names) for part, names in PARTS.items()}

    def bandwidth_floor(self, timing: DecodeTiming) -> float:
        """Returns the least seconds in which this machine moves the bytes of a step."""
        return timing.cost.bandwidth_floor(self.rates.bytes_per_second)

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the study as JSON, completely or not at all.

        An existing file stays until the new one is complete.

        Args:
            path: path of the file; folders are made.

        Raises:
            UserError: the file cannot be written.
        """
        return keep_record(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DecodeStudy":
        """Reads a file that `save` wrote.

        Raises:
            UserError: the file cannot be read, or is not a study.
        """
        with kept_record(path, "a study of decoding") as read:
            return cls(
                machine=dict(read["machine"]),
                rates=DecodeRates(**read["rates"]),
                timings=[_timing(record) for record in read["timings"]],
            )


def _timing(record: JsonDict) -> DecodeTiming:
    cost: JsonDict = {
        name: PartCost(**value) if isinstance(value, dict) else value
        for name, value in record["cost"].items()
    }
    changed = {"seconds": tuple(record["seconds"]), "cost": DecodeCost(**cost)}
    return DecodeTiming(**{**record, **changed})
