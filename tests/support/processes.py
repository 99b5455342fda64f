"""Starts `launch.py train` in processes of its own, and waits for what it does."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax

from tests.support.paths import ROOT
from ultramem_jax.config import RunConfig, to_dict

SOON = 300
"""Seconds that a test waits for an event which should have come long before."""


def config_file(config: RunConfig, folder: pathlib.Path) -> pathlib.Path:
    """Writes a file for `--config` that holds this config, and returns its path."""
    file = folder / "config.py"
    file.write_text(
        "from ultramem_jax.config import run_config_from_dict\n"
        f"def get_config():\n    return run_config_from_dict({to_dict(config)!r})\n"
    )
    return file


def start_training(
    file: pathlib.Path,
    workdir: pathlib.Path,
    *,
    devices: int,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> subprocess.Popen:
    """Starts `python launch.py train` on so many devices, with flags before and after the command's name."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    argv = [sys.executable, "launch.py", *before, "train", f"--config={file}", f"--workdir={workdir}", *after]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(argv, cwd=ROOT, env=environment, **pipes)


def wait_for(there: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until something is there, while the process runs."""
    give_up = time.monotonic() + SOON
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.02)
