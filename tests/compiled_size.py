"""Compiles as outside the tests, where a test judges what the compiler made of a program."""

import os

import jax

_OFF = "--xla_cpu_use_fusion_emitters=false"  # as in conftest.py
_OPTIONS = {"xla_cpu_use_fusion_emitters": True} if _OFF in os.environ["XLA_FLAGS"] else None


def memory_analysis(lowered: jax.stages.Lowered):
    """Returns the bytes that a program takes, compiled with the fusions that users get."""
    return lowered.compile(compiler_options=_OPTIONS).memory_analysis()
