"""A run's folder belongs to one run, and what the system refuses there is said in a line."""

import multiprocessing
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import pytest

from tests.support.paths import ROOT
from ultramem_jax import UserError
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import MetricWriter
from ultramem_jax.training.workdir import owned

pytestmark = pytest.mark.usefixtures("one_device")

HOLDER = """
import pathlib, sys
from ultramem_jax.training.workdir import owned
with owned(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path`/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_and_taken_over_when_its_process_is_dead(config, tmp_path, holder):
    workdir = tmp_path / "run"
    expected = f"{workdir} is in use by process {holder.pid} on {socket.gethostname()}: "
    for _ in range(2):
        with pytest.raises(UserError) as error:
            train(config, workdir, progress=False)
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
        assert sorted(path.name for path in workdir.iterdir()) == [".lock"]
    holder.kill()
    holder.wait()
    with owned(workdir):
        assert (workdir / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_folder_is_held_within_one_process_too_and_free_afterwards(tmp_path):
    for _ in range(2):
        with owned(tmp_path):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), owned(tmp_path):
                pass
            with pytest.raises(UserError, match="in use"), owned(tmp_path):
                pass


def test_a_file_system_without_locks_holds_up_nobody(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ultramem_jax.training.workdir.fcntl.flock", refuse)
    with owned(tmp_path):
        pass
    assert f"{tmp_path}: no lock can be held there (Operation not supported)" in caplog.text


def test_whoever_reads_deletes_nothing(tmp_path):
    state = {"table": jnp.ones(8)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None, {}, {})
    in_flight = tmp_path / "2.orbax-checkpoint-tmp"
    (in_flight / "state").mkdir(parents=True)
    for read_only in (True, False):
        with Checkpoints(tmp_path, read_only=read_only) as checkpoints:
            checkpoints.restore({"table": jnp.zeros(8)})
            assert checkpoints.all_steps() == [1]
        assert (in_flight / "state").is_dir()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, None, {}, {})
    assert not in_flight.exists()


# ---- what the system refuses


def one_line(config, workdir):
    with pytest.raises(UserError) as error:
        train(config, workdir, progress=False)
    message = str(error.value)
    assert "\n" not in message and str(workdir) in message
    return message


@pytest.mark.parametrize(
    "place, reason",
    [
        (lambda tmp_path: tmp_path / ("a" * 300), "File name too long"),
        (lambda tmp_path: tmp_path / "file" / "run", "Not a directory"),
        (lambda tmp_path: pathlib.Path("/dev/null/run"), "Not a directory"),
        (lambda tmp_path: tmp_path / "file", "File exists"),
    ],
)
def test_a_folder_that_cannot_be_made(config, tmp_path, place, reason):
    (tmp_path / "file").touch()
    assert one_line(config, place(tmp_path)).endswith(f": {reason}")


def test_a_file_in_place_of_the_checkpoints(config, tmp_path):
    (tmp_path / "checkpoints").touch()
    assert one_line(config, tmp_path) == f"{tmp_path / 'checkpoints'}: File exists"


@pytest.fixture
def no_save_in_flight(monkeypatch):
    """Every save is waited for; else it would write into what is being deleted."""
    save = Checkpoints.save

    def save_and_wait(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()

    monkeypatch.setattr(Checkpoints, "save", save_and_wait)


def test_a_folder_that_is_deleted_while_the_run_goes_on(config, tmp_path, monkeypatch, no_save_in_flight):
    write = MetricWriter.write

    def delete_at_three(self, step, split, scalars):
        write(self, step, split, scalars)
        if step == 3:
            shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(MetricWriter, "write", delete_at_three)
    without = replace(config, train=replace(config.train, eval_every=0))
    message = one_line(without, tmp_path / "run")
    assert message == f"{tmp_path / 'run' / '.lock'}: No such file or directory"
    assert not (tmp_path / "run").exists()


def test_a_folder_that_another_run_has_made_again_is_left_alone(
    config, tmp_path, monkeypatch, no_save_in_flight
):
    workdir, write = tmp_path / "run", MetricWriter.write
    again = []

    def begin_another(self, step, split, scalars):
        write(self, step, split, scalars)
        if step == 3 and not again:
            shutil.rmtree(workdir)
            again.append(owned(workdir))
            again[0].__enter__()

    monkeypatch.setattr(MetricWriter, "write", begin_another)
    message = one_line(replace(config, train=replace(config.train, eval_every=0)), workdir)
    assert message == f"{workdir} was deleted, and is in use by another run now"
    assert sorted(path.name for path in workdir.iterdir()) == [".lock"]
    again[0].__exit__(None, None, None)


def test_a_name_that_is_not_utf8_is_refused_at_the_start(config, tmp_path):
    with pytest.raises(UserError, match="must be a name in UTF-8"):
        train(config, os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"), progress=False)


def _fill_the_disk(directory, answers):
    """In a process of its own: limits of the system hold for all that a process writes."""
    large = {"table": jnp.arange(2**18, dtype=jnp.float32) * 1.1}
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, large, None, {}, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, resource.RLIM_INFINITY))
        try:
            checkpoints.save(2, large, None, {}, {})
            checkpoints.wait()
        except OSError as error:
            answers.put((error.filename, error.strerror))
        else:
            answers.put(None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        checkpoints.save(3, large, None, {}, {})
        checkpoints.wait()
        answers.put(checkpoints.all_steps())


def test_a_save_that_does_not_fit_is_said_and_the_last_one_stays(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_fill_the_disk, args=(str(tmp_path), answers))
    process.start()
    filename, reason = answers.get(timeout=120)
    assert filename == str(tmp_path)
    last = "the last whole checkpoint is that of step 1"
    assert reason == f"the checkpoint of step 2 cannot be saved: File too large; {last}"
    assert answers.get(timeout=120) == [1, 3]
    process.join()
