"""Counting background reads, and a run that begins with another run and changes only some of its rows."""

import json

import chex
import numpy as np
import pytest

from ultramem_jax.training.background import load_background
from ultramem_jax.training.restore import load_model

MEMORY = "--config.model.memories.ultramem"
TINY = [
    "--preset=ultramem-tiny",
    "--config.model.embed_dim=16",
    "--config.model.num_layers=1",
    "--config.model.mlp_dim=16",
    f"{MEMORY}.placement=1:1",
    f"{MEMORY}.address.num_keys=24",
    "--config.train.steps=2",
    "--config.train.batch_size=4",
    "--config.train.eval_batches=1",
    "--config.data.seq_len=16",
]


def test_a_run_begins_with_another_and_changes_only_some_of_its_rows(run, text, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    status, _, err = run("train", *TINY, *text, f"--workdir={first}")
    assert status == 0, err

    refused = {
        "--path=x": "--path = 'x': needs --dataset",
        "--output=nowhere/x.npz": "--output = 'nowhere/x.npz': must be a file in a folder that exists",
        "--dataset=stdlip": "did you mean 'stdlib'",
        "--dataset=": "error: --dataset: must name a dataset",
        "--seq_len=17": "--seq_len = 17: must be at most 16, what the model reads",
    }
    for flag, said in refused.items():
        status, _, err = run("background", f"--workdir={first}", flag)
        assert status == 2 and said in err.splitlines()[-1], err

    status, out, err = run("background", f"--workdir={first}", "--batches=3")
    assert status == 0, err
    path = first / "background.npz"
    (of,) = load_background(path)[0].values()
    before = load_model(first)
    memory = before.config.model.memories["ultramem"]
    assert of.num_batches == 3 and of.reads.sum() == 3 * 4 * 16 * memory.reads_per_token
    assert len(of.reads) == memory.address.own_slots
    assert (of.batches <= 3).all() and ((of.batches > 0) == (of.reads > 0)).all()
    assert f"background reads: {path}" in out and "3 batches of 4 x 16 tokens of train" in out
    assert f"{(of.reads > 0).mean():.1%}" in out
    with np.load(path) as file:
        about = json.loads(str(file["description"]))
    assert about["split"] == "train" and about["batch"] == [4, 16] and len(about["corpus_hash"]) == 64

    selecting = [
        f"--config.train.background={path}",
        "--config.train.slots_per_step=3",
        "--config.train.trainable=/values$",
    ]
    status, _, err = run("train", f"--init_from={first}", *text, *TINY[6:], *selecting, f"--workdir={second}")
    assert status == 0, err
    after = load_model(second)
    (name,) = before.variables["memory"]
    tables = [np.asarray(of.variables["memory"][name]["values"]) for of in (before, after)]
    assert 3 <= (tables[0] != tables[1]).any(1).sum() <= 6  # two steps of three rows
    chex.assert_trees_all_equal(before.variables["params"], after.variables["params"])
    assert after.config.model == before.config.model

    # An open model that has a memory, and a corpus of its own.
    folder = tmp_path / "open"
    status, _, err = run("export", f"--workdir={first}", f"--folder={folder}")
    assert status == 0, err
    people = ["--dataset=facts:0-20", "--split=validation", "--batches=2", "--batch_size=3", "--seq_len=8"]
    status, out, err = run("background", f"--model={folder}", *people)
    assert status == 0 and "2 batches of 3 x 8 tokens" in out, err
    tables, about = load_background(folder / "background.npz")
    (of,) = tables.values()
    assert of.num_batches == 2 and about["model"] == str(folder) and about["split"] == "validation"


def test_a_run_with_a_tokenizer_and_one_with_lora_are_beginnings_and_read_any_corpus(run, text, tmp_path):
    first, adapted, taught = (tmp_path / name for name in ("first", "adapted", "taught"))
    bpe = ["--config.data.tokenizer=bpe", "--config.data.bpe_vocab_size=300", "--config.model.vocab_size=300"]
    status, _, err = run("train", *TINY, *text, *bpe, f"--workdir={first}")
    assert status == 0, err
    other = tmp_path / "other.txt"
    other.write_text("the slot of a key, and the key of a value;\n" * 400)
    there = ["--dataset=text", f"--path={other}", "--batches=1"]
    for command, said in (("background", "1 batches of 4 x 16 tokens"), ("evaluate", "| test ")):
        status, out, err = run(command, f"--workdir={first}", *there)
        assert status == 0 and said in out, err
    with np.load(first / "background.npz") as file:
        about = json.loads(str(file["description"]))
    assert about["model"] == f"step 2 of {first}"

    lora = [
        "--config.train.lora_rank=2",
        "--config.train.trainable=^lora/",
        "--config.train.learning_rate=0.1",
    ]
    status, _, err = run("train", f"--init_from={first}", *text, *TINY[6:], *lora, f"--workdir={adapted}")
    assert status == 0, err
    selecting = ["--config.train.slots_per_step=3", "--config.train.slot_score=reads"]
    selecting += ["--config.train.trainable=/values$", "--config.train.lora_rank=0"]
    status, _, err = run(
        "train", f"--init_from={adapted}", *text, *TINY[6:], *selecting, f"--workdir={taught}"
    )
    assert status == 0, err
    runs = [load_model(folder) for folder in (first, adapted, taught)]
    for of in runs:
        assert (
            of.tokenizer.vocab_size == runs[0].tokenizer.vocab_size > 257
            and of.tokenizer.eos_id == runs[0].tokenizer.eos_id
        )
        ids = of.tokenizer.encode(other.read_bytes())
        np.testing.assert_array_equal(ids, runs[0].tokenizer.encode(other.read_bytes()))
    before, after, last = (of.variables["params"] for of in runs)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(before, after)  # the factors are merged
    chex.assert_trees_all_equal(after, last)
