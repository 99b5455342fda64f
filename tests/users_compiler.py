"""Compiles as outside the tests, where what is tested is the work of the compiler."""

import functools
import os

import jax

_OFF = "--xla_cpu_use_fusion_emitters=false"  # as in conftest.py
_OPTIONS = {"xla_cpu_use_fusion_emitters": True} if _OFF in os.environ["XLA_FLAGS"] else None


def memory_analysis(lowered: jax.stages.Lowered):
    """Returns the bytes that a program takes, compiled with the fusions that users get."""
    return lowered.compile(compiler_options=_OPTIONS).memory_analysis()


def fuse_as_for_users(monkeypatch) -> None:
    """Makes `jax.jit` compile with the fusions that users get, where two programs must give the same bits."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=_OPTIONS))
