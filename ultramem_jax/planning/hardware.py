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
    device_kinds: tuple[str, ...] = ()
    """Names by which JAX's `Device.device_kind` calls it."""
    notes: tuple[str, ...] = ()
    """The source of each number."""

    def matmul_flops(self, dtype: str) -> float:
        """Returns the FLOPs per second of a model that computes in `float32` or `bfloat16`."""
        return self.bf16_flops if dtype == "bfloat16" else self.fp32_flops


_SECTOR = (
    "Smallest access: the sector of 32 bytes, in which GPUs of NVIDIA reach their memory (CUDA C++ Best "
    "Practices Guide)."
)
_LANES = (
    "Smallest access: not published. Assumed are 512 bytes, a row of 128 lanes of 32 bits. XLA pads narrower "
    "arrays to that, which is in no count of bytes held here."
)
HARDWARE = {
    "a100": Hardware(
        name="A100 SXM 80 GB",
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bytes=80e9,
        memory_bytes_per_second=2.039e12,
        access_bytes=32,
        node_link_bytes=300e9,
        outer_link_bytes=25e9,
        devices_per_node=8,
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        notes=(
            "NVIDIA A100 SXM data sheet: 312 TFLOP/s in bfloat16 without sparsity, 19.5 TFLOP/s in float32 "
            "without TF32, 80 GB, 2,039 GB/s.",
            _SECTOR,
            "NVLink: 600 GB/s on the data sheet are both directions together, 300 GB/s each.",
            "Between nodes: an InfiniBand port of 200 Gb/s in each direction for every GPU (DGX A100 data "
            "sheet), 25 GB/s. 8 GPUs per node.",
        ),
    ),
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
        device_kinds=("NVIDIA H100 80GB HBM3",),
        notes=(
            "NVIDIA H100 SXM data sheet: 989 TFLOP/s in bfloat16 without sparsity (the sheet prints 1,979 "
            "with it), 67 TFLOP/s in float32 without TF32, 80 GB, 3.35 TB/s.",
            _SECTOR,
            "NVLink: 900 GB/s on the data sheet are both directions together, 450 GB/s each.",
            "Between nodes: an InfiniBand port of 400 Gb/s in each direction for every GPU (DGX H100 data "
            "sheet), 50 GB/s. 8 GPUs per node.",
        ),
    ),
    "h200": Hardware(
        name="H200 SXM",
        bf16_flops=989e12,
        fp32_flops=67e12,
        memory_bytes=141e9,
        memory_bytes_per_second=4.8e12,
        access_bytes=32,
        node_link_bytes=450e9,
        outer_link_bytes=50e9,
        devices_per_node=8,
        device_kinds=("NVIDIA H200",),
        notes=(
            "NVIDIA H200 SXM data sheet: 989 TFLOP/s in bfloat16 without sparsity, 67 TFLOP/s in float32 "
            "without TF32, 141 GB, 4.8 TB/s.",
            _SECTOR,
            "NVLink: 900 GB/s on the data sheet are both directions together, 450 GB/s each.",
            "Between nodes: an InfiniBand port of 400 Gb/s in each direction for every GPU (DGX H200 data "
            "sheet), 50 GB/s. 8 GPUs per node.",
        ),
    ),
    "b200": Hardware(
        name="B200",
        bf16_flops=2250e12,
        fp32_flops=75e12,
        memory_bytes=180e9,
        memory_bytes_per_second=7.7e12,
        access_bytes=32,
        node_link_bytes=900e9,
        outer_link_bytes=50e9,
        devices_per_node=8,
        device_kinds=("NVIDIA B200",),
        notes=(
            "NVIDIA HGX B200 data sheet, an eighth of a board: 2,250 TFLOP/s in bfloat16 without sparsity, "
            "75 TFLOP/s in float32 without TF32, 180 GB, 7.7 TB/s.",
            _SECTOR,
            "NVLink: 1,800 GB/s on the data sheet are both directions together, 900 GB/s each.",
            "Between nodes: a port of 400 Gb/s in each direction for every GPU (DGX B200 data sheet), 50 "
            "GB/s. 8 GPUs per node.",
        ),
    ),
    "tpu-v5e": Hardware(
        name="TPU v5e",
        bf16_flops=197e12,
        fp32_flops=197e12 / 6,
        memory_bytes=16e9,
        memory_bytes_per_second=819e9,
        access_bytes=512,
        node_link_bytes=100e9,
        outer_link_bytes=3.125e9,
        devices_per_node=256,
        device_kinds=("TPU v5 lite", "TPU v5e"),
        notes=(
            "Google Cloud, TPU v6e beside v5e: 197 TFLOP/s in bfloat16, 16 GB, 819 GB/s, pods of 256 chips. "
            "Float32 is not published: a sixth, for the six bfloat16 passes of a product at full precision.",
            _LANES,
            "ICI: 1,600 Gb/s of four links, 200 GB/s in each direction. A group along one axis of the torus "
            "has two of the four links: 100.",
            "Beyond a pod: 6.4 Tb/s per pod (the same page), 25 Gb/s or 3.125 GB/s per chip. The pod counts "
            "as the node.",
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
        device_kinds=("TPU v5", "TPU v5p"),
        notes=(
            "Google Cloud, TPU v5p: 459 TFLOP/s in bfloat16, 95 GB, 2,765 GB/s, pods of 8,960 chips. "
            "Float32 is not published: a sixth, for the six bfloat16 passes of a product at full precision.",
            _LANES,
            "ICI: 1,200 GB/s are both directions of all six links, 600 GB/s each (4,800 Gb/s in older "
            "versions of the page). A group along one axis of the torus has two of the six links: 200.",
            "Beyond a pod: the network of the data centre, 50 Gb/s or 6.25 GB/s per chip (the same page). "
            "The pod counts as the node.",
        ),
    ),
    "tpu-v6e": Hardware(
        name="TPU v6e",
        bf16_flops=918e12,
        fp32_flops=918e12 / 6,
        memory_bytes=32e9,
        memory_bytes_per_second=1.64e12,
        access_bytes=512,
        node_link_bytes=200e9,
        outer_link_bytes=12.5e9,
        devices_per_node=256,
        device_kinds=("TPU v6 lite", "TPU v6e"),
        notes=(
            "Google Cloud, TPU v6e: 918 TFLOP/s in bfloat16, 32 GB, 1,640 GB/s, pods of 256 chips. Float32 "
            "is not published: a sixth, for the six bfloat16 passes of a product at full precision.",
            _LANES,
            "ICI: 800 GB/s are both directions of all four links, 400 GB/s each. A group along one axis of "
            "the torus has two of the four links: 200.",
            "Beyond a pod: 25.6 Tb/s per pod (the same page), 100 Gb/s or 12.5 GB/s per chip. The pod "
            "counts as the node.",
        ),
    ),
}
"""Known devices by the name that `--hardware` takes."""


def hardware_of(device_kind: str) -> Hardware | None:
    """Returns the published rates of a device by JAX's `Device.device_kind`; None if they are not known."""
    return next((found for found in HARDWARE.values() if device_kind in found.device_kinds), None)


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


_LISTS = ("device_kinds", "notes")
"""Fields that are lists of strings."""


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
        if name in tree and name not in _LISTS:
            _check(name, field.type, tree[name])
    lists = {name: tree.get(name, ()) for name in _LISTS}
    for name, value in lists.items():
        plain = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        require(plain, f"hardware.{name}", value, "must be a list of strings")
    return Hardware(**(tree | {name: tuple(value) for name, value in lists.items()}))


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
