"""Releases of jaxlib that make programs slow are named, with what mends it."""

import logging

import pytest

from ultramem_jax.parallel.known_faults import slow_atomics, warn_of_known_faults

CUDA = "PJRT C API\ncuda 13000"
FLAG = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.10.2.dev3"])
def test_a_release_that_loops_is_named_with_the_flag(version):
    line = slow_atomics(CUDA, version, "")
    assert line is not None and version in line and FLAG in line and "0.11.1" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "platform, version, flags",
    [
        (CUDA, "0.10.1", ""),
        (CUDA, "0.11.1", ""),
        (CUDA, "0.12.0", ""),
        (CUDA, "0.10.2", f"--xla_x=1 {FLAG}"),
        (CUDA, "0.10.2", "--xla_gpu_ftz=true"),
        ("cpu", "0.10.2", ""),
        ("PJRT C API\nTFRT TPU v5e", "0.10.2", ""),
        ("PJRT C API\nrocm 60000", "0.10.2", ""),
    ],
)
def test_nothing_is_said_otherwise(platform, version, flags):
    assert slow_atomics(platform, version, flags) is None


def test_a_cpu_has_no_known_fault(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_known_faults()
    assert not caplog.records
