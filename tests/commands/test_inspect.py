"""The command `inspect` writes pages of runs and open models, and saves models with edited rows."""

import json
import re

import chex
import numpy as np
import pytest

from tests.support.programs import TINY
from ultramem_jax.interop import open_models
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.metrics import read_metrics
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.state import abstract_state


@pytest.fixture
def trained(run, text, tmp_path):
    status, _, err = run("train", *TINY, *text, f"--workdir={tmp_path / 'run'}")
    assert status == 0, err
    return tmp_path / "run"


def _data(path):
    found = re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found[1])


def _state(workdir):
    """The whole state of a run's checkpoint, moments included, and the checkpoint's meta."""
    loaded = load_model(workdir)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        abstract = abstract_state(loaded.config, make_optimizers(loaded.config), one_device())
        restored = checkpoints.restore(abstract, step=loaded.step)
    return restored.state, restored.meta


def test_pages_and_edited_models(run, trained, text, tmp_path):
    out, at = tmp_path / "page.html", f"--workdir={trained}"
    status, said, err = run(
        "inspect",
        at,
        "--text=the slot of a",
        f"--out={out}",
        "--batches=2",
        "--cards=6",
        "--knock_out=ultramem_0:3,ultramem_0:4,ultramem_0:3",
    )
    assert status == 0, err
    assert f"{out} (" in said and out.as_uri() in said
    assert re.search(r"without 2 slots: \d\.\d{4} -> \d\.\d{4} nats per token \([+-]0\.\d{4}\)", said)
    assert "corpus: 100%" in err and "nearest slots, ultramem_0: 100%" in err
    data = _data(out)
    assert len(data["tokens"]) == 14 and data["corpus"]["tokens"] == 2 * 8 * 16
    assert "step 2 of" in data["subtitle"] and data["corpus"]["name"].startswith(
        "2 batches of the train split of text /"
    )
    assert {"3", "4"} <= set(data["tables"]["ultramem_0"]["cards"])

    # An edited run differs in its rows, and in nothing else. Records after the checkpoint are not its own.
    metrics = trained / "metrics.jsonl"
    later = '{"step": 3, "split": "train", "ultramem_0/read_entropy": 1.5}'
    metrics.write_text(f"{metrics.read_text()}{later}\n")
    edited = tmp_path / "edited"
    edits = ["--edit=ultramem_0:5=scale:-2", "--edit=ultramem_0:7=swap:9"]
    status, said, err = run("inspect", at, *edits, f"--save_to={edited}", "--text=the slot of a")
    assert status == 0, err
    assert re.search(r"edited: \d\.\d{4} -> \d\.\d{4} nats per token", said)
    assert f"edited model: {edited}" in said and [
        line.split("|")[3].strip() for line in said.splitlines() if "| ultramem_0" in line
    ] == ["5", "7", "9"]
    (old, old_meta), (new, new_meta) = _state(trained), _state(edited)
    before, after = (np.asarray(state.tables["ultramem_0"]["values"]) for state in (old, new))
    differ = (before.view(np.uint32) != after.view(np.uint32)).any(1)
    assert np.flatnonzero(differ).tolist() == [5, 7, 9]
    np.testing.assert_array_equal(after[[5, 7, 9]], np.stack([-2 * before[5], before[9], before[7]]))
    chex.assert_trees_all_equal(old.replace(tables={}), new.replace(tables={}))
    assert (new_meta.config, new_meta.corpus, new_meta.step) == (old_meta.config, old_meta.corpus, 2)
    records = read_metrics(edited / "metrics.jsonl")
    assert records == [of for of in read_metrics(metrics) if of["step"] <= 2] and len(records) > 0
    status, said, err = run("evaluate", f"--workdir={edited}", "--splits=validation", "--batches=1")
    assert status == 0 and "step 2 of" in said, err
    # Training goes on from it.
    more = [flag for flag in TINY if "steps" not in flag]
    status, said, err = run("train", *more, "--config.train.steps=3", *text, f"--workdir={edited}")
    assert status == 0 and load_model(edited).step == 3, err

    # An open model.
    folder, again = tmp_path / "open", tmp_path / "open_edited"
    status, _, err = run("export", at, f"--folder={folder}")
    assert status == 0, err
    status, said, err = run("inspect", f"--model={folder}", "--edit=ultramem_0:1=zero", f"--save_to={again}")
    assert status == 0 and "--model=" in said, err
    (_, first), (_, second) = open_models.load(folder), open_models.load(again)
    before, after = (np.asarray(held["memory"]["ultramem_0"]["values"]) for held in (first, second))
    assert np.flatnonzero((before != after).any(1)).tolist() == [1] and (after[1] == 0).all()
    chex.assert_trees_all_equal(first["params"], second["params"])
    (tmp_path / "t.txt").write_bytes(b"a key \xff</script>")
    status, said, err = run(
        "inspect", f"--model={again}", f"--text_file={tmp_path / 't.txt'}", f"--out={out}", "--cards=2"
    )
    assert status == 0, err
    assert _data(out)["corpus"] is None and _data(out)["tokens"][7]["text"] == "\\xff"

    refused = {
        (at,): "--text: must be given, or --text_file",
        (at, "--text=a", "--text_file=b"): "--text_file = 'b': must not be given with --text",
        (at, "--text_file=nowhere"): "nowhere: No such file or directory",
        (at, "--text="): "text = b'': must have at least one token",
        (at, "--text=" + "a" * 16): "tokens of the text = 17: must be at most 16",
        (
            at,
            "--text=a",
            "--out=nowhere/x.html",
        ): "--out = 'nowhere/x.html': must be a file in a folder that exists and can be written to",
        (at, "--text=a", "--knock_out=ultramem_0"): "--knock_out = 'ultramem_0': must be MEMORY:SLOT",
        (at, "--text=a", "--knock_out=ultramem_9:1"): "unknown memory 'ultramem_9'",
        (at, "--text=a", "--path=x"): "--path = 'x': needs --dataset",
        (at, "--text=a", "--nocorpus", "--dataset=stdlib"): "--dataset = 'stdlib': must not be given with",
        (at, "--text=a", "--nocorpus", "--split=test"): "--split = 'test': must not be given with --nocorpus",
        (
            f"--model={folder}",
            "--text=a",
            "--batches=9",
        ): "--batches = 9: needs a corpus: --dataset must name",
        (f"--model={folder}", "--text=a", "--batch_size=9"): "--batch_size = 9: needs a corpus",
        (f"--model={folder}", "--text=a", "--path=x"): "--path = 'x': needs a corpus",
        (f"--model={folder}", "--text=a", "--corpus"): "--dataset: must name a dataset; the tr",
        (at, "--edit=ultramem_0:1=zero"): "needs --save_to",
        (at, "--text=a", "--save_to=x"): "--save_to = 'x': needs --edit",
        (at, "--edit=ultramem_0:1=zero", f"--save_to={edited}"): "must be a new or an empty folder",
        # Before the model is read.
        ("--workdir=no", "--edit=a:1=zero", f"--save_to={edited}"): f"--save_to = '{edited}': must be a new",
        ("--workdir=no", "--edit=a:1=zero", f"--save_to={out}/x"): f"{out}/x': {out} cannot be written to",
        (
            "--workdir=no",
            "--text=a",
            f"--out={tmp_path}",
        ): f"--out = '{tmp_path}': must be a file in a folder",
        (f"--model={folder}", "--dtype=bfloat16", "--edit=ultramem_0:1=zero", "--save_to=x"): (
            "--dtype = 'bfloat16': must not be given with --edit"
        ),
        (at, "--edit=ultramem_0:1=zap", f"--save_to={tmp_path / 'new'}"): "unknown action of --edit",
        (
            at,
            "--edit=ultramem_0:1=zero",
            "--save_to=x",
            "--knock_out=ultramem_0:1",
        ): "must not be given with --edit",
        (at, "--edit=ultramem_0:1=zero", "--save_to=x", "--cards=3"): "--cards = 3: must not be given with",
    }
    for flags, expected in refused.items():
        status, _, err = run("inspect", *flags)
        assert status == 2 and expected in err.splitlines()[-1], (flags, err)
    assert not (tmp_path / "new").exists()
