"""Describes accelerators for `plan`: rates and sizes, by name or from a JSON file."""

import dataclasses
import json
import math
import pathlib
from dataclasses import dataclass

from ultramem_jax.errors import UserError, require, unknown
from ultramem_jax.tree_types import JsonDict


@dataclass(frozen=True)
class Hardware:
    """Describes one kind of device and its links; rates are per second and device, links per direction."""

    name: str
    bf16_flops: float
    """FLOPs per second of dense matrix products in bfloat16."""
    fp32_flops: float
    """FLOPs per second of dense matrix products in float32."""
    memory_bytes: float
    memory_bytes_per_second: float
    """Bandwidth of the device's memory: bytes read and written."""
    access_bytes: int
    """Bytes of the smallest memory access: a shorter row costs as much."""
    node_link_bytes: float
    """Bytes per second that a device sends within a node, or over ICI."""
    outer_link_bytes: float
    """Bytes per second that a device sends to other nodes, or over the data centre's network."""
    devices_per_node: int
    notes: tuple[str, ...] = ()
    """The source of each number."""

    def matmul_flops(self, dtype: str) -> float:
        """Returns the FLOPs per second of a model that computes in `float32` or `bfloat16`."""
        return self.bf16_flops if dtype == "bfloat16" else self.fp32_flops


HARDWARE = {
    "h100": Hardware(
        name="H100 SXM",
        bf16_flops=989e12,
        fp32_flops=67e12,
        memory_bytes=80e9,
        memory_bytes_per_second=3.35e12,
        access_bytes=32,
        node_link_bytes=450e9,
        outer_link_bytes=50e9,
        devices_per_node=8,
        notes=(
            "NVIDIA H100 SXM data sheet: 989 TFLOP/s in bfloat16 without sparsity (the sheet prints 1,979 "
            "with it), 67 TFLOP/s in float32 without TF32, 80 GB, 3.35 TB/s.",
            "Smallest access: the sector of 32 bytes, in which GPUs of NVIDIA reach their memory (CUDA C++ "
            "Best Practices Guide).",
            "NVLink: 900 GB/s on the data sheet are both directions together, 450 GB/s each.",
            "Between nodes: an InfiniBand port of 400 Gb/s in each direction for every GPU (DGX H100 data "
            "sheet), 50 GB/s. 8 GPUs per node.",
        ),
    ),
    "tpu-v5p": Hardware(
        name="TPU v5p",
        bf16_flops=459e12,
        # Not published. XLA computes a float32 product at full precision in six bfloat16 passes.
        fp32_flops=459e12 / 6,
        memory_bytes=95e9,
        memory_bytes_per_second=2.765e12,
        access_bytes=512,
        node_link_bytes=200e9,
        outer_link_bytes=6.25e9,
        devices_per_node=8960,
        notes=(
            "Google Cloud, TPU v5p: 459 TFLOP/s in bfloat16, 95 GB, 2,765 GB/s, pods of 8,960 chips. "
            "Float32 is not published: a sixth, for the six bfloat16 passes of a product at full precision.",
            "Smallest access: not published. Assumed are 512 bytes, a row of 128 lanes of 32 bits. XLA "
            "pads narrower arrays to that, which is in no count of bytes held here.",
            "ICI: 1,200 GB/s are both directions of all six links, 600 GB/s each (4,800 Gb/s in older "
            "versions of the page). A group along one axis of the torus has two of the six links: 200.",
            "Beyond a pod: the network of the data centre, 50 Gb/s or 6.25 GB/s per chip (the same page). "
            "The pod counts as the node.",
        ),
    ),
}
"""Known devices by the name that `--hardware` takes."""


def load_hardware(name: str) -> Hardware:
    """Returns hardware by name, or from a JSON file with the fields of `Hardware`.

    Args:
        name: a key of `HARDWARE`, or the path of a file.

    Raises:
        UserError: neither, or a file with a field that is unknown, missing or not allowed.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    path = pathlib.Path(name)
    if not path.is_file():
        if path.suffix == ".json":
            raise UserError(f"--hardware = {name!r}: there is no such file")
        raise unknown("hardware", name, HARDWARE)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--hardware = {name!r}: not a JSON file: {error}") from error
    require(isinstance(tree, dict), "--hardware", name, "must hold one JSON object, the fields of Hardware")
    return _from_json(tree, name)


def _from_json(tree: JsonDict, file: str) -> Hardware:
    fields = {field.name: field for field in dataclasses.fields(Hardware)}
    for key in tree:
        if key not in fields:
            raise unknown(f"field of --hardware {file!r}:", key, fields)
    for name, field in fields.items():
        require(
            name in tree or field.default is not dataclasses.MISSING,
            f"hardware.{name}",
            None,
            f"must be given in {file}",
        )
        if name in tree and name != "notes":
            _check(name, field.type, tree[name])
    notes = tree.get("notes", ())
    plain = isinstance(notes, list | tuple) and all(isinstance(note, str) for note in notes)
    require(plain, "hardware.notes", notes, "must be a list of strings")
    return Hardware(**(tree | {"notes": tuple(notes)}))


def _check(name: str, kind: object, value: object) -> None:
    if kind is str:
        require(
            isinstance(value, str) and value != "", f"hardware.{name}", value, "must be a string, not empty"
        )
        return
    what = "a whole number, at least 1" if kind is int else "a number above 0"
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    of_kind = isinstance(value, int) or kind is not int
    require(of_kind and 0 < number < math.inf, f"hardware.{name}", value, f"must be {what}")
