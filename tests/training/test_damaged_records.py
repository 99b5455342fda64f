"""Records of a checkpoint may be anything that JSON can hold: they are read, or refused in one line."""

import json
import shutil

import jax.numpy as jnp
import pytest

from ultramem_jax import UserError
from ultramem_jax.config import RunConfig, to_dict
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.manifest import find_damage, write_manifest
from ultramem_jax.training.restore import load_model

STATE = {"table": jnp.arange(8.0)}
CONFIG = to_dict(RunConfig())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE, None, CONFIG, {"corpus_hash": "0"})
            checkpoints.mark(step, float(step))
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def message(act):
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "change, damage",
    [
        (lambda m: {"files": m["files"]}, "manifest.json has no format"),
        (lambda m: m | {"format": "1"}, "manifest.json has no format"),
        (lambda m: [m], "manifest.json has no format"),
        (lambda m: None, "manifest.json has no format"),
        (lambda m: m | {"files": {}}, "manifest.json lists no files"),
        (lambda m: m | {"files": list(m["files"])}, "manifest.json lists no files"),
        (lambda m: {"format": 1}, "manifest.json lists no files"),
        (
            lambda m: m | {"files": {"meta/metadata": 7}},
            "manifest.json has no size and checksum of meta/metadata",
        ),
        (lambda m: m | {"files": {"meta/metadata": {}}}, "bytes instead of None"),
        (lambda m: m | {"files": {"meta": {"bytes": 1, "crc32": 1}}}, "meta is missing"),
    ],
)
def test_a_manifest_of_an_unknown_form_is_damage(run, change, damage):
    path = run / "checkpoints" / "2" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert damage in find_damage(path.parent)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.restore(STATE).step == 1


def test_what_another_version_wrote_is_refused_and_nothing_deleted(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    manifest = run / "checkpoints" / "2" / "manifest.json"
    content = json.loads(manifest.read_text())

    def refused(said):
        for act in (lambda c: c.restore(STATE), lambda c: c.read_meta(2), lambda c: c.restore(STATE, step=2)):
            with (
                Checkpoints(run / "checkpoints", keep_last=1) as checkpoints,
                pytest.raises(UserError, match=said) as error,
            ):
                act(checkpoints)
            assert "\n" not in str(error.value)

    manifest.write_text(json.dumps(content | {"format": 99}))
    refused(r"2/manifest\.json has the format 99, known is 1")
    manifest.write_bytes(before[manifest])
    rewrite_meta(run, 2, lambda m: m | {"of_the_future": 1})
    refused("2 has of_the_future in its meta: a later version")
    assert {path for path in run.rglob("*") if path.is_file()} == set(before)


def rewrite_meta(run, step, change):
    """Changes what a checkpoint says of itself, with a manifest that agrees."""
    directory = run / "checkpoints" / str(step)
    path = directory / "meta" / "metadata"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    write_manifest(directory)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: None, "meta is a NoneType"),
        (lambda m: [], "meta is a list"),
        (lambda m: {k: v for k, v in m.items() if k != "config"}, "config"),
        (lambda m: m | {"config": None}, "meta: config is a NoneType"),
        (lambda m: m | {"config": [1]}, "meta: config is a list"),
        (lambda m: m | {"corpus": "stdlib"}, "meta: corpus is a str"),
        (lambda m: m | {"step": True}, "meta: step is a bool"),
        (lambda m: m | {"step": "2"}, "meta: step is a str"),
        (lambda m: m | {"since_record": None}, "meta: since_record is a NoneType"),
        (lambda m: m | {"since_record": {"steps": "a"}}, "meta: since_record.steps is a str"),
        (lambda m: m | {"step": m["step"] + 1}, "meta is of step"),
    ],
)
def test_records_of_a_wrong_type_give_way_to_the_checkpoint_before(run, change, reason):
    rewrite_meta(run, 2, change)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(STATE)
        assert restored.step == 1 and reason in restored.skipped[0][1]
    rewrite_meta(run, 1, change)
    assert reason in message(lambda: load_model(run))


@pytest.mark.parametrize(
    "config, reason",
    [
        ({}, "model"),
        (CONFIG | {"model": None}, "model"),
        (CONFIG | {"model": 7}, "model"),
        (CONFIG | {"data": []}, "data"),
        (CONFIG | {"model": CONFIG["model"] | {"memory": "large"}}, "model.memory"),
        (CONFIG | {"model": CONFIG["model"] | {"embed_dim": "128"}}, "model.embed_dim = '128'"),
        (CONFIG | {"model": CONFIG["model"] | {"mpl": 1}}, "unknown config key 'model.mpl'"),
        (CONFIG | {"train": CONFIG["train"] | {"steps": None}}, "train.steps = None"),
    ],
)
def test_a_config_that_is_not_one_is_refused_by_name(run, config, reason):
    rewrite_meta(run, 2, lambda m: m | {"config": config})
    found = message(lambda: load_model(run))
    assert found.startswith(f"checkpoint at {run / 'checkpoints' / '2'} has no valid config: ")
    assert reason in found


NO_RANKS = [
    "",
    "[]",
    "null",
    "[" * 100_000,
    '{"2": 1' + "0" * 400 + "}",
    '{"two": 1}',
    '{"2": "small"}',
    "\0\0",
]


@pytest.mark.parametrize("content", NO_RANKS, ids=range(len(NO_RANKS)))
def test_ranks_that_cannot_be_read_only_cost_the_best(run, caplog, content):
    (run / "checkpoints" / "validation_losses.json").write_text(content)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (None, 2)
        assert checkpoints.restore(STATE).meta.validation_loss is None
    assert "no checkpoint is known as the best" in caplog.text
    # The best may be among those whose losses are lost, so all of them stay.
    with Checkpoints(run / "checkpoints", keep_last=1, keep_best=1) as checkpoints:
        checkpoints.restore(STATE)
        for step in (3, 4):
            checkpoints.save(step, STATE, None, CONFIG, {"corpus_hash": "0"}, 1.0 / step)
    assert checkpoints.all_steps() == [1, 2, 4]


def test_ranks_that_older_versions_kept_in_each_checkpoint_count(run):
    (run / "checkpoints" / "validation_losses.json").unlink()
    for step, loss in ((1, 0.5), (2, 0.25)):
        rewrite_meta(run, step, lambda m, loss=loss: m | {"validation_loss": loss})
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best_step() == 2
        assert checkpoints.read_meta(1).validation_loss == 0.5


def test_ranks_of_steps_that_are_done_again_are_forgotten(run):
    shutil.rmtree(run / "checkpoints" / "2")
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.restore(STATE)
        checkpoints.save(2, STATE, None, CONFIG, {"corpus_hash": "0"})
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.is_marked(1) and not checkpoints.is_marked(2)


def test_a_mark_is_enough_to_delete_what_it_surpasses(run):
    with Checkpoints(run / "checkpoints", keep_last=1, keep_best=1) as checkpoints:
        checkpoints.restore(STATE)
        assert checkpoints.best_step() == 1
        checkpoints.mark(2, 0.5)
    assert checkpoints.all_steps() == [2]
