"""Two processes of two devices each train as one process of four, and survive what happens to processes.

Tables are split over the two processes, by slots. A run that eight devices began goes on anywhere.
"""

import os
import pathlib
import shutil
import signal
import time
from dataclasses import replace

import chex
import jax
import pytest

from tests.support.fixtures import standard_promotion  # noqa: F401  (an autouse fixture)
from tests.support.processes import SOON, config_file, start_training, wait_for
from tests.support.small_run import scalars, small_config
from ultramem_jax.config import MeshConfig
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.training import loop
from ultramem_jax.training.restore import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def config(folder):
    """The run of `small_config`, with tables over two devices and a checkpoint of every step."""
    small = small_config(folder)
    training = replace(small.train, checkpoint_every=1, keep_last=10)
    return replace(small, train=training, mesh=MeshConfig(memory=2))


@pytest.fixture(scope="module")
def launch(config, folder):
    """Starts the run over two devices in each process."""
    file = config_file(config, folder)

    def launch(workdir, *flags, after=()):
        mesh = "--mesh=data:2,memory:2"
        return start_training(file, workdir, devices=2, before=flags, after=[mesh, *after])

    return launch


@pytest.fixture(scope="module")
def train_alone(config):
    """Trains in this process, on some of its devices."""

    def train_alone(workdir, config=config, devices=4):
        mesh = make_mesh(config.mesh, jax.devices()[:devices])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_mesh", lambda _: mesh)
            return loop.train(config, workdir, progress=False)

    return train_alone


@pytest.fixture(scope="module")
def one(train_alone, folder):
    """The run in one process of four devices."""
    train_alone(folder / "one")
    return folder / "one"


def variables(workdir, checkpoint="last"):
    return load_model(workdir, checkpoint).variables


def close(ours, theirs):
    """Sums of four are rounded in another order: losses agree to a few last bits, parameters nearly so."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and (a["step"], a["split"]) == (b["step"], b["split"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def children(process):
    """Ids of the processes that the supervisor started, in their order."""
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, listed))


def test_killed_in_the_middle_two_processes_end_and_the_same_command_ends_as_one_process_does(
    launch, one, folder
):
    workdir = folder / "killed"
    done = workdir / "checkpoints"
    process = launch(workdir, "--processes=2")
    wait_for((done / "1").exists, process)
    os.kill(children(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=SOON)
    assert time.monotonic() - killed < 30
    assert process.returncode == 128 + signal.SIGKILL, err
    line = err.splitlines()[-1]
    assert line == "error: process 1 of 2 was ended by SIGKILL: the others cannot go on without it"

    # A save in flight when it died is lost, or came through.
    last = max(int(p.name) for p in done.iterdir() if p.name.isdecimal())
    process = launch(workdir, "--processes=2")
    out, err = process.communicate(timeout=SOON)
    assert process.returncode == 0, err
    assert f"resumed from step {last}" in err
    close(scalars(workdir), scalars(one))
    chex.assert_trees_all_close(variables(workdir), variables(one), rtol=1e-2, atol=1e-3)
    # One of them speaks, and nothing of what connects them is in its results.
    assert out.splitlines()[0].startswith("validation: ") and out.count("bits per byte") == 1
    assert "Gloo" not in out and err.count("corpus ") == 1 and "Traceback" not in err
    assert (workdir / "loss_curve.png").exists()
    assert {p.name for p in (workdir / "checkpoints/6/data").glob("*.json")} == {"process_0-of-1.json"}


def test_bad_input_ends_them_all_with_one_line(launch, folder):
    process = launch(folder / "refused", "--processes=2", after=["--config.train.batch_size=6"])
    _, err = process.communicate(timeout=SOON)
    assert process.returncode == 2 and "Traceback" not in err
    assert "train.batch_size = 6: a micro-batch of 3 sequences" in err.splitlines()[-1]
    assert err.count("error: ") == 1


@pytest.fixture(scope="module")
def eight(config, train_alone, folder):
    """The run on eight devices, tables by slots over four of them; its config and folder."""
    config = replace(config, mesh=MeshConfig(data=2, memory=4))
    train_alone(folder / "eight", config, 8)
    return config, folder / "eight"


@pytest.fixture
def begun(eight, folder, request):
    """A copy of that run, as it was after a step."""
    workdir = folder / request.node.name
    shutil.copytree(eight[1], workdir)
    for step in range(2, 7):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def assert_ends_as(workdir, whole):
    close(scalars(workdir), scalars(whole))
    chex.assert_trees_all_close(variables(workdir), variables(whole), rtol=1e-2, atol=1e-3)


def test_a_run_of_eight_devices_goes_on_on_one(eight, begun, train_alone):
    config, whole = eight
    result = train_alone(begun, replace(config, mesh=MeshConfig()), 1)
    assert result.finished and {len(a.devices()) for a in jax.tree.leaves(result.state)} == {1}
    assert_ends_as(begun, whole)


def test_a_run_by_slots_goes_on_by_width(eight, begun, train_alone):
    config, whole = eight
    model = replace(config.model, memories={"memory": config.model.memory.changed(partition="width")})
    result = train_alone(begun, replace(config, model=model, mesh=MeshConfig(memory=4)), 4)
    table = result.state.tables["memory_0"]["values"]
    assert result.finished and {s.data.shape for s in table.addressable_shards} == {(24 * 24, 2)}
    assert_ends_as(begun, whole)


def test_it_goes_on_in_two_processes_a_signal_to_one_stops_both_and_one_process_ends_it(
    eight, begun, launch, train_alone
):
    process = launch(begun, "--processes=2")
    wait_for((begun / "checkpoints" / "2").exists, process)
    os.kill(children(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=SOON)
    assert process.returncode == 75, err
    assert "resumed from step 1" in err and err.count("stopped by SIGTERM") == 1
    assert "the same command goes on from there" in out
    last = load_model(begun).step
    assert last == max(r["step"] for r in scalars(begun)) < 6
    assert train_alone(begun).finished
    assert_ends_as(begun, eight[1])
