"""Keeps what `plan` found in a file, from which its document can be made again without compiling."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ultramem_jax.config import run_config_from_dict, to_dict
from ultramem_jax.planning.compiled_step import DeviceBytes
from ultramem_jax.planning.hardware import Hardware
from ultramem_jax.planning.partition import Costs, WayCost
from ultramem_jax.planning.plans import Plan
from ultramem_jax.planning.step_time import TimeEstimate, TimePart
from ultramem_jax.planning.traffic import Traffic
from ultramem_jax.reporting.records import keep_record, kept_record
from ultramem_jax.tree_types import JsonDict


@dataclass(frozen=True)
class PlanStudy:
    """Holds all that the document of a plan says, for the document and its file."""

    title: str
    """Name of what is planned."""
    plans: Sequence[Plan]
    """Planned runs, at least one; all have the same number of devices."""
    hardware: Hardware
    """The device, of which all are alike."""
    partitions: tuple[int, Costs] | None
    """Tokens of a device, and costs from `partition_costs`; None without memories."""
    environment: Mapping[str, str]
    """Strings from `describe_environment`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the study as JSON, all numbers as they were counted."""
        tokens, costs = self.partitions or (None, None)
        tree: JsonDict = {
            "title": self.title,
            "environment": dict(self.environment),
            "hardware": dataclasses.asdict(self.hardware),
            "plans": {plan.name: _tree(plan) for plan in self.plans},
            "partition_tokens": tokens,
            "partition": None if costs is None else _costs_tree(costs),
        }
        keep_record(path, tree)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PlanStudy":
        """Reads what `save` wrote, also where an earlier version wrote the configs.

        Raises:
            UserError: the file cannot be read, or holds no plan.
        """
        with kept_record(path, "a plan") as tree:
            hardware: JsonDict = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in tree["hardware"].items()
            }
            return cls(
                title=tree["title"],
                plans=[_plan(name, of) for name, of in tree["plans"].items()],
                hardware=Hardware(**hardware),
                partitions=tree["partition"] and (tree["partition_tokens"], _costs(tree["partition"])),
                environment=tree["environment"],
            )


def _tree(plan: Plan) -> JsonDict:
    return {
        "note": plan.note,
        "compiler": plan.compiler,
        "config": to_dict(plan.config),
        "bytes": dataclasses.asdict(plan.bytes),
        "argument_bytes": plan.argument_bytes,
        "collectives": [dataclasses.asdict(row) for row in plan.traffic],
        "time": dataclasses.asdict(plan.estimate),
    }


def _costs_tree(costs: Costs) -> dict[int, JsonDict]:
    return {p: {way: dataclasses.asdict(cost) for way, cost in ways.items()} for p, ways in costs.items()}


def _plan(name: str, tree: JsonDict) -> Plan:
    time = tree["time"]
    return Plan(
        name=name,
        config=run_config_from_dict(tree["config"]),
        bytes=DeviceBytes(**tree["bytes"]),
        argument_bytes=tree["argument_bytes"],
        traffic=[Traffic(**row | {"axes": tuple(row["axes"])}) for row in tree["collectives"]],
        estimate=TimeEstimate(tuple(TimePart(**part) for part in time["parts"]), time["tokens"]),
        note=tree["note"],
        compiler=tree.get("compiler", ""),
    )


def _costs(tree: JsonDict) -> Costs:
    return {int(p): {way: WayCost(**cost) for way, cost in ways.items()} for p, ways in tree.items()}
