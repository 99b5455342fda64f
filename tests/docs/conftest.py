"""Runs programs in this process, on one device, with the promotion of dtypes that users have."""

from tests.support.programs import one_device, run, standard_promotion, text

__all__ = ["one_device", "run", "standard_promotion", "text"]
