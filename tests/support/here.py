"""Stands for a card that is not there: its programs are compiled for this machine's CPU."""

import dataclasses

import jax

from ultramem_jax.planning.targets import Target


@dataclasses.dataclass(frozen=True)
class Here(Target):
    """A GPU by name, whose devices are those of this process."""

    compiler: str = "this machine's 1.0"

    def devices(self, number):
        return jax.devices()[:number]
