"""Warns of releases of jaxlib that make programs slow on a device, with the flag or release that mends it."""

import importlib.metadata
import logging
import os
import re

import jax

log = logging.getLogger(__name__)

_SLOW_ATOMICS = (0, 10, 2), (0, 11, 0)
"""First and last release that compile a float32 scatter-add for NVIDIA GPUs to a compare-and-swap loop, 450
to 2,000 times as slow where many indices are equal (openxla/xla#46225, jax-ml/jax#38806)."""
_FLAG = "-nvptx-allow-ftz-atomics"
_OTHER_FLAG = "--xla_gpu_ftz=true"


def warn_of_known_faults() -> None:
    """Logs a line for each known fault of this jaxlib on this process's devices."""
    version = importlib.metadata.version("jaxlib")
    if line := slow_atomics(
        jax.devices()[0].client.platform_version, version, os.environ.get("XLA_FLAGS", "")
    ):
        log.warning("%s", line)


def slow_atomics(platform_version: str, jaxlib_version: str, flags: str) -> str | None:
    """Returns what to do about slow atomic additions of floats, or None if they are not slow.

    The algorithms of this library need none on one GPU; a program beside it may.

    Args:
        platform_version: what the devices' client says, which names CUDA for NVIDIA GPUs.
        jaxlib_version: release of jaxlib.
        flags: the variable XLA_FLAGS.
    """
    release = tuple(int(part) for part in re.findall(r"\d+", jaxlib_version)[:3])
    first, last = _SLOW_ATOMICS
    is_slow = "cuda" in platform_version.lower() and first <= release <= last
    if not is_slow or _FLAG in flags or _OTHER_FLAG in flags:
        return None
    return (
        f"jaxlib {jaxlib_version} compiles float32 scatter-adds for this GPU to loops: set "
        f"XLA_FLAGS=--xla_backend_extra_options={_FLAG}, or take jaxlib 0.11.1 or later"
    )
