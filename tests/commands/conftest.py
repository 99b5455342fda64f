"""Runs programs in this process, on one device, with the promotion of dtypes that users have."""

from tests.support.fixtures import one_device, standard_promotion
from tests.support.programs import on_one_device, run, text

__all__ = ["on_one_device", "one_device", "run", "standard_promotion", "text"]
