"""What `bench_decode` measured, and the file that keeps it.

Tables and figures are made of a `DecodeStudy` alone, so that they can be made again without measuring.
"""

import dataclasses
import json
import os
import pathlib
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ultramem_jax.accounting import DecodeCost, PartCost
from ultramem_jax.errors import UserError
from ultramem_jax.files import replace_text

STUDIES = ("batch", "sparsity")
"""Time against the sequences of a batch, and against the slots or experts of a model."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention", "cache"),
    "feed_forward": ("feed_forward",),
    "memory": ("memory", "memory_rows"),
    "logits": ("logits",),
}
"""The parts that are timed alone, with the parts of a `DecodeCost` that each of them is."""


@dataclass(frozen=True)
class DecodeRates:
    """Measured rates of the machine, medians."""

    flops_per_second: dict[str, float]
    """Of a square matrix product, by dtype (`experiments.machine.product_flops_per_second`); a dtype that was
    not measured is absent."""
    bytes_per_second: float
    """Read, and not written (`experiments.machine.read_bytes_per_second`): a step writes next to nothing."""

    @classmethod
    def median(cls, rates: Sequence["DecodeRates"]) -> "DecodeRates":
        """The median of each rate, of at least one measurement of the same dtypes."""
        return cls(
            flops_per_second={
                dtype: statistics.median(each.flops_per_second[dtype] for each in rates)
                for dtype in rates[0].flops_per_second
            },
            bytes_per_second=statistics.median(each.bytes_per_second for each in rates),
        )


@dataclass(frozen=True)
class DecodeTiming:
    """One model at one batch: the times of a step in which each sequence gets one token."""

    study: str
    """Of `STUDIES`."""
    system: str
    """As figures and tables name it: `dense`, `moe`, `pkm`, `ultramem`, ..."""
    preset: str
    """The preset it is, or is made from."""
    dtype: str
    """That weights are served in."""
    batch: int
    """B, sequences."""
    cache_length: int
    """Positions that each sequence attends to."""
    cache_dtype: str
    """Of their keys and values."""
    sparse_over_dense: float
    """Parameters of tables or experts over the weights of the dense model's layers: about 12 for
    ultramem-151m-x12. 0 of the dense model."""
    parameters: int
    """All of them."""
    seconds: tuple[float, ...]
    """Of a step, one per repeat."""
    parts: dict[str, float] | None
    """Median seconds of a step's parts, of `PARTS`, each timed alone; None if they were not timed."""
    cost: DecodeCost
    """What the step must compute and move at least, with as many experts and rows as the steps chose."""

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise ValueError(f"study = {self.study!r}: must be one of {', '.join(STUDIES)}")
        if not self.seconds or min(self.seconds) <= 0:
            raise ValueError(f"seconds = {self.seconds!r}: must be times above 0, at least one")
        if unknown := set(self.parts or {}) - set(PARTS):
            raise ValueError(f"parts = {sorted(unknown)}: must be among {', '.join(PARTS)}")

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.batch / self.median


@dataclass(frozen=True)
class DecodeStudy:
    """Everything that was measured on one machine."""

    machine: dict[str, str]
    """As of `experiments.environment()`: command, commit, date, cores, versions, devices."""
    rates: DecodeRates
    timings: list[DecodeTiming]
    """In the order in which systems are to appear."""

    def __post_init__(self) -> None:
        counts = Counter(
            (t.study, t.system, t.dtype, t.batch, t.cache_length, t.sparse_over_dense) for t in self.timings
        )
        if twice := [key for key, count in counts.items() if count > 1]:
            raise ValueError(f"timings: {twice[0]} is there twice")

    @property
    def device(self) -> str:
        """What it ran on, such as `cpu` or `NVIDIA H100 80GB HBM3`; without their number."""
        return re.sub(r"^\d+ × | \(\w+\)$", "", self.machine.get("devices", "unknown device"))

    @property
    def on_cpu(self) -> bool:
        """Whether it ran on a CPU."""
        return self.machine.get("devices", "").endswith("(cpu)")

    @property
    def dtypes(self) -> list[str]:
        """Those that were timed, in the order of the timings."""
        return list(dict.fromkeys(t.dtype for t in self.timings))

    def of(self, study: str, dtype: str | None = None, system: str | None = None) -> list[DecodeTiming]:
        """The timings of a study, by dtype, batch, system and sparsity; None takes all."""
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
        """The timings of a study as of `of`, apart by system, in the order in which systems appear."""
        systems = dict.fromkeys(t.system for t in self.timings)
        found = {system: self.of(study, dtype, system) for system in systems}
        return {system: timings for system, timings in found.items() if timings}

    def beside(self, timing: DecodeTiming, system: str) -> DecodeTiming | None:
        """The timing of another system in the study `batch` at the same dtype, batch and cache; or None."""
        return self.at(timing.dtype, timing.batch, system, timing.cache_length)

    def at(self, dtype: str, batch: int, system: str, cache_length: int | None = None) -> DecodeTiming | None:
        """As `beside`, of any cache if None is given."""
        found = (t for t in self.of("batch", dtype, system) if t.batch == batch)
        return next((t for t in found if cache_length in (None, t.cache_length)), None)

    def floor(self, timing: DecodeTiming) -> float | None:
        """The least seconds of its step on this machine; None if no rate was measured in its dtype."""
        flops = self.rates.flops_per_second.get(timing.dtype)
        return flops and timing.cost.floor(flops, self.rates.bytes_per_second)

    def part_floors(self, timing: DecodeTiming) -> dict[str, float]:
        """The least seconds of the parts that are timed, by name; empty as `floor` is None."""
        flops = self.rates.flops_per_second.get(timing.dtype)
        if not flops:
            return {}
        floors = timing.cost.part_floors(flops, self.rates.bytes_per_second)
        return {part: sum(floors[name] for name in names) for part, names in PARTS.items()}

    def bandwidth_floor(self, timing: DecodeTiming) -> float:
        """The least seconds in which this machine moves the bytes of its step."""
        return timing.cost.bandwidth_floor(self.rates.bytes_per_second)

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the study as JSON, whole or not at all: what was there stays until the new one is complete.

        Args:
            path: of the file; folders are made.

        Raises:
            UserError: it cannot be written.
        """
        path = pathlib.Path(path)
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written, {error.strerror}") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DecodeStudy":
        """Reads what `save` wrote.

        Raises:
            UserError: it cannot be read, or is not a study.
        """
        try:
            read = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            return cls(
                machine=dict(read["machine"]),
                rates=DecodeRates(**read["rates"]),
                timings=[_timing(record) for record in read["timings"]],
            )
        except OSError as error:
            raise UserError(f"{path}: cannot be read, {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a study of decoding, {type(error).__name__}: {error}") from error


def _timing(record: Mapping[str, Any]) -> DecodeTiming:
    cost: dict[str, Any] = {
        name: PartCost(**value) if isinstance(value, dict) else value
        for name, value in record["cost"].items()
    }
    changed = {"seconds": tuple(record["seconds"]), "cost": DecodeCost(**cost)}
    return DecodeTiming(**{**record, **changed})
