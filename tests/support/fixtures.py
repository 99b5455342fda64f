"""Holds the fixtures of several folders: each conftest.py imports those that its tests need."""

import jax
import pytest

from experiments.common import seeds
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.training import loop


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Promotes dtypes as for users: optax multiplies its float rates by integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def one_device():
    """Trains on one device, which compiles in half the time; other tests are about meshes of many."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, seeds):
            patch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield
