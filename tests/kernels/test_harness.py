"""Kernels in a program of their own: under sanitizers, for another CPU, and by another compiler.

`make test-native` runs it. A part is skipped where its compiler or emulator is not installed.
"""

import os
import pathlib
import platform
import shutil

import pytest

from tests.support.kernel_case import RandomDraw, check
from tests.support.kernel_cases import CASES
from tests.support.kernel_harness import compile_harness, record, run
from ultramem_jax.kernels.compiler import machine_flags

pytestmark = pytest.mark.builds

COMPILER = shutil.which("c++")
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
CASES_OF_EACH = 12


def _checked(command, folder, monkeypatch, **environment):
    cases = [draw(RandomDraw(seed)) for draw in CASES.values() for seed in range(CASES_OF_EACH)]
    recorded = [record(case, monkeypatch) for case in cases]
    found, printed = run(command, folder, recorded, **environment)
    for case, results in zip(cases, found, strict=True):
        check(case, results)
    return printed


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_under_a_sanitizer(sanitizer, tmp_path, monkeypatch):
    flags = [
        "-O1",
        "-g",
        "-DULTRAMEM_OWN_THREADS",
        "-pthread",
        *SANITIZERS[sanitizer],
        *machine_flags(),
    ]
    program = compile_harness(tmp_path, COMPILER, flags)
    printed = _checked([str(program)], tmp_path, monkeypatch, UBSAN_OPTIONS="print_stacktrace=1")
    assert "WARNING: ThreadSanitizer" not in printed and "ERROR" not in printed


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("width", ["avx2", "portable"])
def test_kernels_with_narrower_vectors(width, tmp_path, monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("only x86-64 has several widths")
    if width == "avx2" and "avx2" not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    flags = ["-O2", *(["-mavx2", "-mfma"] if width == "avx2" else [])]
    program = compile_harness(tmp_path, COMPILER, [*flags, "-DULTRAMEM_OWN_THREADS", "-pthread"])
    _checked([str(program)], tmp_path, monkeypatch)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_kernels_on_arm64(tmp_path, monkeypatch):
    flags = ["-O3", "-static", "-DULTRAMEM_OWN_THREADS", "-pthread"]
    program = compile_harness(tmp_path, "aarch64-linux-gnu-g++", flags)
    _checked(["qemu-aarch64", str(program)], tmp_path, monkeypatch, PATH=os.environ["PATH"])


@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang++")
def test_kernels_by_clang(tmp_path, monkeypatch):
    flags = ["-O2", *machine_flags(), "-DULTRAMEM_OWN_THREADS", "-pthread"]
    program = compile_harness(tmp_path, "clang++", flags)
    _checked([str(program)], tmp_path, monkeypatch)
