"""Compiles as for users, where what is tested is the work of the compiler."""

import functools

import jax

_OPTION = "xla_cpu_use_fusion_emitters"
_HAS_OLDER = jax.__version_info__ < (0, 11)
OLDER_FUSIONS = f"--{_OPTION}=false" if _HAS_OLDER else ""
"""Flag of XLA that conftest.py sets: another third faster to compile; jax 0.11 has only the newer way."""
_OPTIONS = {_OPTION: True} if _HAS_OLDER else None


def memory_analysis(lowered: jax.stages.Lowered):
    """Returns the bytes that a program takes, compiled with the fusions that users get."""
    return lowered.compile(compiler_options=_OPTIONS).memory_analysis()


def fuse_as_for_users(monkeypatch) -> None:
    """Makes `jax.jit` compile with the fusions that users get, where two programs must give the same bits."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=_OPTIONS))
