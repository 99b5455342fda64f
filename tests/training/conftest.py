import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """optax multiplies its float rates by integer counts, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
