"""Keeps what `bench_step` measured in a file, from which tables and figures can be made again."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.bench_step.lookups import LookupResult
from experiments.bench_step.parts import PartTimes
from experiments.bench_step.study import PartsResult, StepResult
from experiments.common import report
from experiments.common.machine import Rates
from experiments.common.timing import Timing, spread
from ultramem_jax.accounting import PartCost, floor_seconds
from ultramem_jax.config import MemoryConfig, run_config_from_dict, to_dict
from ultramem_jax.reporting.records import keep_record, kept_record
from ultramem_jax.tree_types import JsonDict


@dataclass(frozen=True)
class Study:
    """Holds all measurements of the layer, or of the model."""

    name: str
    """Name of the study's files, without suffix."""
    title: str
    about: str
    """Description of the model around the memory, for the notes."""
    memory: MemoryConfig
    """Memory of one size and one way; the notes read from it what all of them have in common."""
    tokens: int
    repeats: int
    memory_limit: int | None
    """Bytes that steps had to fit into; None without a limit."""
    rates: Rates
    environment: Mapping[str, str]
    """Strings from `describe_environment()`."""
    steps: list[StepResult]
    """Measured steps, in the order of their slots."""
    parts: list[PartsResult]
    lookups: list[LookupResult]
    """The lookup and its update beside that of another library; none without that library."""

    @property
    def device(self) -> str:
        """Returns the kind of the devices, such as `cpu` or `NVIDIA H100 80GB HBM3`, without their number."""
        return report.device_kind(self.environment)

    @property
    def on_cpu(self) -> bool:
        """Tells whether the study ran on a CPU."""
        return report.is_cpu(self.environment)

    def floor_ms(self, cost: PartCost) -> float:
        """Returns the least milliseconds that this machine needs for a cost."""
        rates = self.rates
        return 1e3 * floor_seconds(
            cost, rates.flops_per_second, rates.bytes_per_second, rates.row_bytes_per_second
        )

    def timed(self, slots: int, way: str) -> StepResult | None:
        """Returns a step of the study; None if it was not timed."""
        found = (step for step in self.steps if (step.slots, step.way) == (slots, way) and step.timing)
        return next(found, None)

    def median(self, slots: int, way: str) -> float | None:
        """Returns the median milliseconds of a step; None if it was not timed."""
        step = self.timed(slots, way)
        return spread(step.timing.ms)[0] if step and step.timing else None

    def save(self, path: pathlib.Path) -> pathlib.Path:
        """Writes the study as JSON, with the floor of every step beside it; returns the path."""
        tree = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tree |= {"memory": to_dict(self.memory), "rates": dataclasses.asdict(self.rates)}
        tree |= {"steps": [self._step_tree(step) for step in self.steps]}
        tree |= {"parts": [_parts_tree(parts) for parts in self.parts]}
        tree |= {"lookups": [dataclasses.asdict(lookup) for lookup in self.lookups]}
        return keep_record(path, tree)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Study":
        """Reads what `save` wrote.

        Raises:
            UserError: the file cannot be read, or is not a study.
        """
        with kept_record(path, "a study of steps") as tree:
            made = {
                "memory": _memory(tree["memory"]),
                "rates": Rates(**tree["rates"]),
                "steps": [_step(step) for step in tree["steps"]],
                "parts": [_parts(parts) for parts in tree["parts"]],
                "lookups": [LookupResult(**lookup) for lookup in tree["lookups"]],
            }
            return cls(**tree | made)

    def _step_tree(self, step: StepResult) -> JsonDict:
        timing = step.timing and step.timing._asdict()
        return dataclasses.asdict(step) | {"timing": timing, "floor_ms": self.floor_ms(step.cost)}


def _parts_tree(parts: PartsResult) -> JsonDict:
    costs = {name: dataclasses.asdict(cost) for name, cost in parts.costs.items()}
    return {"slots": parts.slots, "way": parts.way, "costs": costs, "times": parts.times._asdict()}


def _memory(tree: JsonDict) -> MemoryConfig:
    model = {"memories": {"memory": tree}}
    memory = run_config_from_dict({"model": model, "data": {}, "train": {}}).model.memory
    assert memory is not None
    return memory


def _step(tree: JsonDict) -> StepResult:
    known = {name: value for name, value in tree.items() if name != "floor_ms"}
    made = {
        "cost": PartCost(**tree["cost"]),
        "timing": tree["timing"] and Timing(**tree["timing"]),
        "beside": tuple(tree["beside"]),
    }
    return StepResult(**known | made)


def _parts(tree: JsonDict) -> PartsResult:
    costs = {name: PartCost(**cost) for name, cost in tree["costs"].items()}
    return PartsResult(tree["slots"], tree["way"], costs, PartTimes(**tree["times"]))
