"""Runs kernels in a program of their own, `tests/kernels/harness.cc`, which any compiler can build."""

import struct
import subprocess
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.paths import ROOT
from ultramem_jax.kernels import build, calls
from ultramem_jax.kernels.compiler import include_flags

HARNESS = ROOT / "tests" / "kernels" / "harness.cc"
_DTYPES = {"bool": 1, "int32": 4, "uint16": 7, "uint32": 8, "float32": 11, "bfloat16": 16}
"""XLA's numbers of dtypes."""


@dataclass
class Recorded:
    """A call as it reaches the kernel."""

    name: str
    arguments: list[np.ndarray]
    results: list[jax.ShapeDtypeStruct]
    aliases: dict[int, int]
    attributes: dict[str, np.generic]


def record(case, monkeypatch):
    """The call of a case, which is not made."""
    seen = []

    def _call(name, results, input_output_aliases=None):
        shapes = [results] if isinstance(results, jax.ShapeDtypeStruct) else list(results)

        def call(*arguments, **attributes):
            arrays = [np.asarray(a) for a in arguments]
            seen.append(Recorded(name, arrays, shapes, input_output_aliases or {}, attributes))
            zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
            return zeros[0] if isinstance(results, jax.ShapeDtypeStruct) else zeros

        return call

    with monkeypatch.context() as patch:
        patch.setattr(calls, "_call", _call)
        case.function(*case.arrays, **case.options)
    (call,) = seen
    return call


def compile_harness(folder, compiler, flags):
    """The program, with all kernels."""
    program = folder / "harness"
    sources = [str(HARNESS), *map(str, build.sources())]
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        *flags,
        *include_flags(),
        *sources,
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def _encoded(recorded):
    def number(*values):
        return b"".join(struct.pack("<q", int(v)) for v in values)

    def text(words):
        return number(len(words)) + words.encode()

    def shape(array):
        return number(_DTYPES[str(array.dtype)], len(array.shape), *array.shape)

    replaced = {out: into for into, out in recorded.aliases.items()}
    parts = [text(recorded.name)]
    parts += [number(len(recorded.arguments), len(recorded.results), len(recorded.attributes))]
    for a in recorded.arguments:
        parts += [shape(a), number(a.nbytes), np.ascontiguousarray(a).tobytes()]
    for i, r in enumerate(recorded.results):
        parts += [shape(r), number(r.size * r.dtype.itemsize, replaced.get(i, -1))]
    for name, value in recorded.attributes.items():
        is_float = isinstance(value, np.floating)
        data = np.float32(value).tobytes() + bytes(4) if is_float else number(value)
        parts += [text(name), number(is_float), data]
    return b"".join(parts)


def run(command, folder, recorded, **environment):
    """The results of calls, as arrays, from a program; fails with what it prints."""
    (folder / "in").write_bytes(struct.pack("<q", len(recorded)) + b"".join(map(_encoded, recorded)))
    done = subprocess.run(
        [*command, str(folder / "in"), str(folder / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    data, at, found = (folder / "out").read_bytes(), 0, []
    for call in recorded:
        results = []
        for r in call.results:
            size = r.size * r.dtype.itemsize
            results.append(np.frombuffer(data[at : at + size], r.dtype).reshape(r.shape))
            at += size
        found.append(results)
    assert at == len(data)
    return found, done.stderr
