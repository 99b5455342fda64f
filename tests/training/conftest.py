import jax
import pytest

from tests.training.small_run import small_config
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.training import loop


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """optax multiplies its float rates by integer counts, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def one_device():
    """Meshes of many devices are the business of other tests; one compiles in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The run of `small_config`."""
    return small_config(tmp_path_factory.mktemp("corpus"))
