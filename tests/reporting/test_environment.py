"""A report says where its numbers were measured, and nothing about who measured them."""

import platform
import sys

import jax
import numpy as np
import pytest

from ultramem_jax.kernels import native
from ultramem_jax.reporting import environment
from ultramem_jax.reporting.environment import describe_environment


def test_environment_names_versions_and_devices(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch.py", "train", "--steps=3"])
    found = describe_environment()
    assert found["command"] == "python launch.py train --steps=3"
    assert found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__
    assert found["python"] == platform.python_version()
    assert found["devices"] == "8 × cpu (cpu)"
    assert int(found["cores"]) >= 1
    assert {"cpu", "os", "jaxlib", "flax", "optax", "orbax-checkpoint", "date"} <= set(found)


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        ("AVX2, c++ (Debian 12.2.0-14) 12.2.0", "AVX2, c++ (Debian 12.2.0-14) 12.2.0"),
        ("Permission denied: /home/me/.cache/ultramem_jax/kernels", "Permission denied: kernels"),
        ("c++ failed: '/home/me/clone/call.cc:1': error: n/a", "c++ failed: 'call.cc:1': error: n/a"),
    ],
)
def test_why_there_are_no_kernels_names_no_folder(about, shown, monkeypatch):
    monkeypatch.setattr(native, "status", lambda: native.Status(False, about))
    assert describe_environment()["memory layers"] == f"JAX, without native kernels ({shown})"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ([str(environment._ROOT / "launch.py"), "bench_step"], "python launch.py bench_step"),
        (
            ["launch.py", "--out=/somewhere/else/runs", "--data", "/a/b/enwik8.gz"],
            "python launch.py --out=runs --data enwik8.gz",
        ),
        (
            ["launch.py", f"--out={environment._ROOT}/experiments/results"],
            "python launch.py --out=experiments/results",
        ),
        (
            ["launch.py", "~/private/config.py", "../place/config.py"],
            "python launch.py config.py config.py",
        ),
        (
            ["launch.py", "x", "--coordinator_address=127.0.0.1:5", "--num_processes=2", "--process_id=0"],
            "python launch.py --processes=2 x",
        ),
        (["launch.py", "--config.title=two words"], "python launch.py '--config.title=two words'"),
        (["-c"], "python -c"),
    ],
)
def test_command_is_told_without_foreign_folders(argv, command):
    assert environment._command(argv) == command


def test_a_package_inside_another_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", environment._ROOT / "tests")
    assert environment._commit() == ""


def test_the_installed_command_has_a_name_of_its_own():
    assert environment._command(["/venv/bin/ultramem", "plan"]) == "ultramem plan"
    assert environment._command(["/site/ultramem_jax/__main__.py", "count"]) == "ultramem count"
    assert environment._command(["/site/other/__main__.py", "count"]) == "python __main__.py count"
