"""Strict numerics for every test: eight simulated devices, no silent promotion, a compilation cache."""

import os
import pathlib
import tempfile

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("ULTRAMEM_TEST_CACHE", str(pathlib.Path(tempfile.gettempdir()) / "ultramem_jax_tests")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
