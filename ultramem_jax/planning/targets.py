"""Makes devices that are not there, for which the real compilers of GPUs and TPUs compile programs.

A TPU's compiler is in the package `libtpu`. That of NVIDIA's GPUs is in `jax-cuda13-pjrt`, and needs a
description of the card, but no CUDA. requirements-audit.txt lists both; they belong to one release of JAX.
"""

import importlib.metadata
import math
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jax.experimental import topologies

from ultramem_jax.errors import UserError, require, unknown

_GPU, _TPU = "jax-cuda13-pjrt", "libtpu"


@dataclass(frozen=True)
class Card:
    """Describes an NVIDIA GPU to XLA, which chooses kernels by it."""

    name: str
    capability: int
    """Major number of the compute capability; the minor one is 0."""
    cores: int
    """Number of streaming multiprocessors."""
    fpus_per_core: int
    """Float32 units of a multiprocessor."""
    memory_bytes: int
    memory_bytes_per_second: int
    l2_bytes: int
    clock_ghz: float
    shared_bytes_per_core: int
    """Shared memory of a multiprocessor, of which a block can have all but 1 KiB."""

    def text(self) -> str:
        """Returns the description as the text of XLA's `GpuTargetConfigProto`."""
        fields = dict(
            threads_per_block_limit=1024,
            threads_per_warp=32,
            shared_memory_per_block=49152,
            shared_memory_per_core=self.shared_bytes_per_core,
            shared_memory_per_block_optin=self.shared_bytes_per_core - 1024,
            threads_per_core_limit=2048,
            core_count=self.cores,
            fpus_per_core=self.fpus_per_core,
            block_dim_limit_x=2**31 - 1,
            block_dim_limit_y=65535,
            block_dim_limit_z=65535,
            memory_bandwidth=self.memory_bytes_per_second,
            l2_cache_size=self.l2_bytes,
            clock_rate_ghz=self.clock_ghz,
            device_memory_size=self.memory_bytes,
            registers_per_core_limit=65536,
            registers_per_block_limit=65536,
        )
        lines = "".join(f"  {name}: {value}\n" for name, value in fields.items())
        # The card's name and its version of CUB are left out: with both, XLA would ask CUB itself for the
        # workspace of its sorts, which needs a card.
        lines += f"  cuda_compute_capability {{ major: {self.capability} }}\n"
        return (
            f'gpu_device_info {{\n{lines}}}\nplatform_name: "CUDA"\n'
            f'dnn_version_info {{ major: 9 minor: 10 }}\ndevice_description_str: "{self.name}"\n'
        )


CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", 8, 108, 64, 85100068864, 2039040000000, 41943040, 1.41, 167936),
    "h100": Card("NVIDIA H100 80GB HBM3", 9, 132, 128, 84942979072, 3352320000000, 52428800, 1.98, 233472),
    "h200": Card("NVIDIA H200 141GB HBM3e", 9, 132, 128, 151397597184, 4800000000000, 52428800, 1.98, 233472),
    "b200": Card("NVIDIA B200", 10, 148, 128, 191514411008, 7672320000000, 132644864, 1.965, 233472),
}
"""GPUs by the name that `--target` takes. Numbers are those of XLA's descriptions, in openxla/xla under
xla/backends/gpu/target_config/specs."""

TPUS = {"tpu-v5e": "2x2", "tpu-v5p": "2x2x1", "tpu-v6e": "2x2"}
"""TPUs by the name that `--target` takes, and the smallest topology of each that its compiler knows."""


@dataclass(frozen=True)
class Target:
    """Names the devices that a program is compiled for."""

    name: str
    """The name, as `load_target` takes it."""
    platform: Literal["gpu", "tpu"]
    kind: str
    """Name of the TPU (`v5e`) or description of the card as text."""
    topology: str
    """Number of devices along each axis of a TPU's topology, as in 2x2; "" for GPUs."""

    @property
    def compiler(self) -> str:
        """Returns the package that holds the compiler, and its version."""
        package = _GPU if self.platform == "gpu" else _TPU
        return f"{package} {importlib.metadata.version(package)}"

    def devices(self, number: int) -> Sequence[jax.Device]:
        """Returns the first `number` devices, which can only be compiled for.

        Raises:
            UserError: the compiler is not installed, does not know the topology, or has fewer devices.
        """
        package = _GPU if self.platform == "gpu" else _TPU
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"--target = {self.name!r}: needs the package {package}; install requirements-audit.txt into "
                "an environment of its own"
            ) from None
        # The devices of this machine are not needed, and JAX would start all that it has packages for.
        jax.config.update("jax_platforms", "cpu")
        try:
            found = self._topology(number).devices
        except (RuntimeError, ValueError, NotImplementedError) as error:
            # JAX's errors are of several lines, the first of which says what is wrong.
            raise UserError(f"--target = {self.name!r}: {str(error).splitlines()[0]}") from error
        require(
            number <= len(found),
            "mesh",
            f"{number} devices",
            f"must be at most the {len(found)} of --target = {self.name!r}",
        )
        return found[:number]

    def _topology(self, number: int) -> topologies.TopologyDescription:
        if self.platform == "tpu":
            # Two processes may compile at a time: neither takes hold of a TPU.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            return topologies.get_topology_desc(platform="tpu", topology_name=f"{self.kind}:{self.topology}")
        # Processes of a partition, and devices of a process.
        hosts = f"1x{math.ceil(number / 8)}x{min(number, 8)}"
        return topologies.get_topology_desc("card", platform="cuda", target_config=self.kind, topology=hosts)


_NEEDED = (
    "gpu_device_info",
    "threads_per_block_limit",
    "threads_per_warp",
    "shared_memory_per_block",
    "threads_per_core_limit",
    "core_count",
    "fpus_per_core",
    "block_dim_limit_x",
    "memory_bandwidth",
    "clock_rate_ghz",
    "device_memory_size",
    "registers_per_block_limit",
    "cuda_compute_capability",
)
"""Fields of a card's description."""


def load_target(name: str) -> Target:
    """Returns a target by its name, or for a card that a file describes.

    Args:
        name: a key of `CARDS`, as many GPUs as the mesh has; a key of `TPUS`, with or without a topology
            (`tpu-v5p:8x8x16`); or the path of a text proto that describes a card, as XLA has for each.

    Raises:
        UserError: none of these, or a file that cannot be read.
    """
    if name in CARDS:
        return Target(name, "gpu", CARDS[name].text(), "")
    kind, _, topology = name.partition(":")
    if kind in TPUS:
        axes = TPUS[kind].count("x") + 1
        require(
            not topology or re.fullmatch("x".join([r"[1-9]\d*"] * axes), topology) is not None,
            "--target",
            name,
            f"must be {kind} or {kind}:{'x'.join('ABC'[:axes])}, the number of chips along each axis",
        )
        return Target(name, "tpu", kind.removeprefix("tpu-"), topology or TPUS[kind])
    path = pathlib.Path(name)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--target = {name!r}: cannot be read: {error}") from error
        # XLA divides by some of these, and the process would end without a word.
        missing = [field for field in _NEEDED if field not in text]
        allowed = "must hold a GpuTargetConfigProto, as text"
        require(not missing, "--target", name, f"{allowed}; it has no {', '.join(missing[:1])}")
        return Target(name, "gpu", text, "")
    raise unknown("target", name, [*CARDS, *TPUS])
