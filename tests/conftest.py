"""Strict numerics for every test: eight simulated devices, no silent promotion, a compilation cache."""

import gc
import os
import pathlib
import signal
import tempfile

import jax
import pytest
from absl import flags

from tests.support.users_compiler import OLDER_FUSIONS
from ultramem_jax.kernels import native

# Tests compile much and compute little. LLVM, which makes machine code of what XLA has optimized, may leave
# out what pays for itself only on long runs: a third of the time of a training step's tests. A program is not
# split for LLVM, as every core has a test of its own: 6 %. And fusions are made in XLA's older way, where it
# has one.
_FLAGS = (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    OLDER_FUSIONS,
)
os.environ["XLA_FLAGS"] = " ".join(filter(None, _FLAGS))

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("ULTRAMEM_TEST_CACHE", str(pathlib.Path(tempfile.gettempdir()) / "ultramem_jax_tests")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# A full collection walks over all compiled programs. At Python's thresholds hundreds would run in a suite.
gc.set_threshold(10_000, 20, 50)


FLAGS_OF_IMPORTS = pytest.StashKey[list[str]]()
"""Modules of the repository that had defined flags when all tests were imported."""


def pytest_collection_finish(session):
    """Keeps which flags the imports of tests define: `test_imports` says what is wrong with them."""
    modules = flags.FLAGS.flags_by_module_dict()
    own = ("experiments.", "ultramem_jax.")
    session.config.stash[FLAGS_OF_IMPORTS] = sorted(name for name in modules if name.startswith(own))


@pytest.fixture(autouse=True, scope="module")
def older_objects_rest():
    """Keeps what a module leaves out of later garbage collections.

    Compiled programs and their Python objects stay for the whole run, and every full collection would walk
    over them: 5 to 8 % of the time of `tests/layers`, and more towards the end of the suite.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def without_kernels():
    """Traces functions without native kernels, for tests of what only JAX's own functions do."""
    with native.turned_off():
        yield


@pytest.fixture
def interruptible():
    """Handles SIGINT as in a terminal, though parallel workers and jobs in the background ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
