"""The whole of `forgetting`, on small models: from a text and an open model to the report."""

import argparse
import hashlib
import inspect
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.forgetting import grafted, speed, systems
from experiments.forgetting.measurements import Study
from experiments.forgetting.methods import SPARSE
from tests.experiments.test_forgetting import MODEL, SETTING
from tests.support.gguf_models import write_small_smollm2
from ultramem_jax.data import builder, sources
from ultramem_jax.training.background import load_background


@pytest.fixture
def enwik8(tmp_path, monkeypatch):
    """A text that is taken for enwik8."""
    data = b"".join(Path(of.__file__).read_bytes() for of in (argparse, inspect, tarfile))
    monkeypatch.setattr(sources, "ENWIK8_BYTES", len(data))
    monkeypatch.setattr(sources, "ENWIK8_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(builder, "cache_folder", lambda: tmp_path / "cache")
    path = tmp_path / "enwik8"
    path.write_bytes(data)
    return path


def test_a_small_model_and_an_open_one_are_taught(run, tmp_path, monkeypatch, enwik8):
    write_small_smollm2(tmp_path / "small.gguf")
    # Only methods that have rates are compared.
    setting = replace(SETTING, mixture_bytes=20_000, rates={SPARSE.name: (1e-2,)})
    monkeypatch.setattr(systems, "preset", lambda name: MODEL)
    monkeypatch.setattr(systems, "FOR_OWN", setting)
    monkeypatch.setattr(systems, "FOR_GRAFTED", setting)
    monkeypatch.setattr(grafted, "STEPS", 2)
    work, results = tmp_path / "work", tmp_path / "results"
    flags = [f"--enwik8={enwik8}", f"--model={tmp_path / 'small.gguf'}", "--systems=Memory+", "--seeds=1"]
    flags += [f"--workdir={work}", f"--results={results}", "--parts=comparison,sequence", "--tasks=2"]
    status, _, err = run("forgetting", *flags, "--reuse")
    assert status == 2 and "must hold the forgetting.json that --reuse needs" in err, err
    status, out, err = run("forgetting", *flags)
    assert status == 0, err
    assert (results / "forgetting.md").read_text() in out

    study = Study.load(results / "forgetting.json")
    names = ["Memory+", "small with Memory+"]
    assert [setup.system for setup in study.setups] == [of.system for of in study.runs] == names
    assert [of.system for of in study.sequences] == [of.system for of in study.tunings] == names
    assert all(len(sequence.left) == 2 for sequence in study.sequences)
    own, of_open = study.setups
    assert own.without_memory is None and "3 steps of 16 × 128 tokens" in own.words
    # What the report has is not measured again.
    for part in ("tuning", "comparison", "sequence"):
        shutil.rmtree(work / part)
    status, out, err = run("forgetting", *flags, "--reuse")
    again = Study.load(results / "forgetting.json")
    assert status == 0 and again == study, err
    assert not any((work / part).exists() for part in ("tuning", "comparison", "sequence"))
    # In two steps a memory changes the loss, but by little.
    assert 0 < abs(of_open.without_memory - of_open.with_memory) < 0.1 * of_open.without_memory
    # The background is counted in batches as large as those of a task.
    for folder in ("grafted_base", "memory-plus-tiny_base"):
        counts, about = load_background(work / folder / "background.npz")
        assert about["batch"] == [2, 32] and about["num_batches"] == 1
        assert [of.num_batches for of in counts.values()] == [1]


def test_steps_with_and_without_a_selection_are_timed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SIDES", (64,))
    monkeypatch.setattr(speed, "TOKENS", (1, 32))
    status, out, err = run("forgetting", "--parts=speed", "--repeats=1", f"--results={tmp_path}")
    assert status == 0 and "## What the selection costs" in out, err
    (plain, *others) = Study.load(tmp_path / "forgetting.json").speeds
    assert (plain.slots, plain.selection, plain.ratio) == (4096, "all rows", 1.0) and plain.ms > 0
    assert [of.selection for of in others] == ["tf_idf", "kl"] and all(of.ratio > 0 for of in others)
