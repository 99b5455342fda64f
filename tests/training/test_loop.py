import contextlib
import json
import logging
import pathlib
import signal
import time
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from tests.support.processes import config_file, start_training, wait_for
from tests.support.small_run import files, scalars, stop_at_three
from ultramem_jax import UserError
from ultramem_jax.config import (
    ModelConfig,
    RunConfig,
    run_config_from_dict,
    to_dict,
)
from ultramem_jax.data import eval_batches
from ultramem_jax.kernels import native
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.presets import families
from ultramem_jax.training import checkpoint_reading, loop
from ultramem_jax.training.evaluation import Evaluator
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import MetricWriter
from ultramem_jax.training.restore import load_model

pytestmark = pytest.mark.usefixtures("one_device")


def test_a_run_learns_and_records_what_it_promises(config, whole):
    result, workdir = whole
    assert result.finished and result.step == 6
    records = scalars(workdir)
    training = [r for r in records if r["split"] == "train"]
    validation = [r for r in records if r["split"] == "validation"]
    assert [r["step"] for r in training] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in validation] == [3, 6]
    assert validation[1]["loss"] < validation[0]["loss"] < np.log(257)
    assert result.validation_loss == validation[1]["loss"]
    names = {"loss", "bits_per_byte", "learning_rate", "gradient_norm", "auxiliary_loss"}
    of_memory = {"slots_read_share", "read_entropy", "top_1_score", "top_m_score", "output_std"}
    of_memory |= {"core_singular_value_1", "core_singular_value_2"}
    assert names | {f"memory_0/{name}" for name in of_memory} <= set(training[0])
    shares = [r["memory_0/slots_read_share"] for r in training]
    assert 0 < shares[0] <= shares[-1] <= 1 and shares == sorted(shares)


def test_half_and_half_is_the_whole_bit_for_bit(config, whole, tmp_path, monkeypatch):
    stop_at_three(monkeypatch)
    first = train(config, tmp_path, progress=False)
    assert not first.finished and first.step == 3
    monkeypatch.undo()
    second = train(config, tmp_path, progress=False)
    assert second.finished and second.step == 6
    chex.assert_trees_all_equal(whole[0].state, second.state)
    assert scalars(tmp_path) == scalars(whole[1])


def test_a_finished_run_started_again_only_reports(config, whole):
    result, workdir = whole
    again = train(config, workdir, progress=False)
    assert again.step == 6 and again.validation_loss == pytest.approx(result.validation_loss, rel=1e-6)
    chex.assert_trees_all_equal(result.state, again.state)


def test_stopped_or_killed_the_same_command_ends_on_the_same_numbers(config, tmp_path):
    # Long enough that the moment falls anywhere: in a step, in a save, between the two.
    longer = replace(config, train=replace(config.train, steps=14, eval_every=0, checkpoint_every=1))
    workdir = tmp_path / "interrupted"
    file = config_file(longer, tmp_path)
    process = start_training(file, workdir, devices=1)
    wait_for((workdir / "checkpoints" / "2").exists, process)
    time.sleep(np.random.default_rng(0).uniform(0, 0.3))
    process.kill()
    process.communicate()
    killed_at = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    assert killed_at < 14

    process = start_training(file, workdir, devices=1)
    wait_for((workdir / "checkpoints" / str(killed_at + 1)).exists, process)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 75, err
    assert "the same command goes on from there" in out and f"resumed from step {killed_at}" in err

    resumed = train(longer, workdir, progress=False)
    uninterrupted = train(longer, tmp_path / "other", progress=False)
    assert resumed.finished
    chex.assert_trees_all_equal(resumed.state, uninterrupted.state)
    assert scalars(workdir) == scalars(tmp_path / "other")


def test_a_truncated_checkpoint_gives_way_to_the_one_before(config, whole, tmp_path, caplog):
    import shutil

    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "6"
    files = [f for f in newest.rglob("*") if f.is_file() and f.stat().st_size > 100 and "state" in f.parts]
    largest = max(files, key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-50])
    with caplog.at_level(logging.WARNING):
        result = train(config, tmp_path, progress=False)
    assert "skipping damaged checkpoint" in caplog.text and str(newest) in caplog.text
    chex.assert_trees_all_equal(whole[0].state, result.state)


def _in_memory_of(kind, config):
    memory = config.model.memory.changed(memory_kind=kind)
    return replace(config, model=replace(config.model, memories={"memory": memory}))


@pytest.mark.usefixtures("without_kernels")  # kernels do not serve the host's memory
def test_a_run_goes_on_with_its_tables_in_another_memory(config, tmp_path, monkeypatch):
    whole = train(config, tmp_path / "whole", progress=False)
    stop_at_three(monkeypatch)
    first = train(_in_memory_of("pinned_host", config), tmp_path, progress=False)
    assert first.step == 3
    assert {a.sharding.memory_kind for a in jax.tree.leaves(first.state.tables)} == {"pinned_host"}
    monkeypatch.undo()
    # Read where it was trained, and on the device.
    loaded = load_model(tmp_path, 3)
    assert loaded.variables["memory"]["memory_0"]["values"].sharding.memory_kind == "pinned_host"
    chex.assert_trees_all_equal(loaded.variables["memory"], first.state.tables)
    second = train(config, tmp_path, progress=False)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(second.state.tables)} == {"device"}
    chex.assert_trees_all_equal(whole.state, second.state)


@pytest.fixture(scope="module")
def smooth(config, tmp_path_factory):
    """A run whose steps depend on gradients smoothly.

    A first step of Adam is as long as the learning rate, however small the gradient is. Where the terms of a
    gradient cancel up to their rounding, the step would be up to the order of the sum.
    """
    config = replace(config, train=replace(config.train, eps=1e-4))
    return config, train(config, tmp_path_factory.mktemp("smooth"), progress=False).state


@pytest.mark.skipif(not native.status().on, reason=str(native.status()))
@pytest.mark.parametrize("first", ["native", "jax"])
def test_a_run_goes_on_with_kernels_or_without(smooth, tmp_path, monkeypatch, first):
    config, whole = smooth
    ways = {"native": contextlib.nullcontext, "jax": native.turned_off}
    stop_at_three(monkeypatch)
    with ways.pop(first)():
        assert train(config, tmp_path, progress=False).step == 3
    monkeypatch.undo()
    (other,) = ways.values()
    with other():
        resumed = train(config, tmp_path, progress=False).state
    assert resumed.step == whole.step
    chex.assert_trees_all_close(resumed.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(resumed.tables, whole.tables, rtol=1e-5, atol=1e-6)


def test_a_memory_that_the_devices_do_not_have_is_refused(config, tmp_path, monkeypatch):
    with_it = _in_memory_of("pinned_host", config)

    class Device:
        device_kind = "abacus"

        def default_memory(self):
            return type("Memory", (), {"kind": "device"})

        def addressable_memories(self):
            return [self.default_memory()]

    monkeypatch.setattr("ultramem_jax.training.state.jax.local_devices", lambda: [Device()])
    allowed = "must be 'device' here: abacus has the memories device"
    with pytest.raises(UserError, match=f"memory.table.memory_kind = 'pinned_host': {allowed}"):
        train(with_it, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_fields_that_a_memory_did_not_have_then_are_as_by_default():
    config = to_dict(RunConfig(model=ModelConfig(memories={"memory": families.ultramem()})))
    there = json.loads(json.dumps(config))
    for field in ("dtype", "memory_kind", "partition"):
        del there["model"]["memories"]["memory"]["table"][field]
    table = config["model"]["memories"]["memory"]["table"]
    table["partition"] = "width"  # where tables lie is no matter
    checkpoint_reading.require_same_model(pathlib.Path("1"), there, config)
    table["dtype"] = "bfloat16"
    with pytest.raises(UserError, match=r"table.dtype is 'float32' there and 'bfloat16' here"):
        checkpoint_reading.require_same_model(pathlib.Path("1"), there, config)


def test_a_checkpoint_of_another_model_is_refused(config, whole):
    other = replace(config, model=replace(config.model, mlp_dim=32))
    with pytest.raises(UserError, match=r"model\.mlp_dim.*16.*32"):
        train(other, whole[1], progress=False)


def test_fewer_steps_than_were_done_are_refused(config, whole):
    fewer = replace(config, train=replace(config.train, steps=5))
    with pytest.raises(UserError, match=r"train\.steps = 5: must be at least 6"):
        train(fewer, whole[1], progress=False)


def test_other_data_than_the_checkpoints_is_refused(config, whole, tmp_path):
    text = pathlib.Path(config.data.path).read_text()
    (tmp_path / "other.txt").write_text(text[::-1])
    other = replace(config, data=replace(config.data, path=str(tmp_path / "other.txt")))
    before = files(whole[1])
    with pytest.raises(UserError, match=r"is not the one that .* was trained on"):
        train(other, whole[1], progress=False)
    assert files(whole[1]) == before


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("data", "seq_len", 8),
        ("train", "batch_size", 32),
        ("train", "seed", 1),
        ("train", "table_gradient", "dense"),
        ("train", "optimizer", "lion"),
        ("train", "row_optimizer", "sgd"),
    ],
)
def test_settings_that_would_make_it_another_run_are_refused(config, whole, part, field, value):
    other = replace(config, **{part: replace(getattr(config, part), **{field: value})})
    before = files(whole[1])
    with pytest.raises(UserError, match=rf"{part}\.{field} = {value!r}: must stay"):
        train(other, whole[1], progress=False)
    assert files(whole[1]) == before


def test_a_refused_run_keeps_the_tokenizer_of_the_one_before(config, tmp_path):
    model, train_once = replace(config.model, vocab_size=300), replace(config.train, steps=1)
    data = replace(config.data, tokenizer="bpe", bpe_vocab_size=280)
    train(RunConfig(model, data, train_once), tmp_path / "run", progress=False)
    before = files(tmp_path / "run")
    (tmp_path / "other.txt").write_text("quite another text, with other pairs of bytes\n" * 300)
    other = replace(data, path=str(tmp_path / "other.txt"))
    with pytest.raises(UserError, match="was trained on"):
        train(RunConfig(model, other, train_once), tmp_path / "run", progress=False)
    assert files(tmp_path / "run") == before


def test_a_validation_split_that_is_too_short_is_refused_before_training(config, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 3000)
    short = replace(config, data=replace(config.data, path=str(tmp_path / "short.txt"), seq_len=200))
    with pytest.raises(UserError, match=r"data\.seq_len = 200: .* the validation split"):
        train(short, tmp_path / "run", progress=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.txt").write_text("x" * 3000)
    one = replace(config, data=replace(config.data, path=str(tmp_path / "folder")))
    with pytest.raises(UserError, match=r"data\.path: no text .* (validation|train) split"):
        train(one, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_table_that_is_not_finite_is_not_saved(config, tmp_path):
    memory = config.model.memory.changed(value_lr_multiple=1e30)
    wild = replace(config, model=replace(config.model, memories={"memory": memory}))
    wild = replace(wild, train=replace(wild.train, checkpoint_every=1))
    with pytest.raises(UserError, match=r"step 1: memory_0/row_norm = (inf|nan).*there is no checkpoint yet"):
        train(wild, tmp_path, progress=False)
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(tmp_path)


def test_the_best_checkpoint_needs_a_validation_loss(config, tmp_path, monkeypatch):
    monkeypatch.setattr(MetricWriter, "write", lambda *_: signal.raise_signal(signal.SIGTERM))
    train(config, tmp_path, progress=False)
    assert load_model(tmp_path).step == 1
    with pytest.raises(UserError, match="checkpoint = 'best': no checkpoint here has a validation loss"):
        load_model(tmp_path, "best")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    make = loop.make_train_step

    def poisoned(*args, **kwargs):
        step = make(*args, **kwargs)

        def at_four(state, tokens, halted):
            state, metrics = step(state, tokens, halted)
            bad = jax.numpy.where(state.step == 4, jax.numpy.nan, metrics["loss"])
            return state, metrics | {"loss": bad}

        return at_four

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    with pytest.raises(UserError, match=r"step 4: loss = nan.*checkpoint is that of step 2"):
        train(config, tmp_path, progress=False)
    assert load_model(tmp_path).step == 2


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", make_mesh)  # of all eight
    uneven = replace(config, train=replace(config.train, batch_size=12, grad_accumulation=1))
    with pytest.raises(
        UserError, match=r"train\.batch_size = 12: .* does not divide over the 8 devices along data"
    ):
        train(uneven, tmp_path, progress=False)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(config, tmp_path):
    small = replace(config, model=replace(config.model, vocab_size=200))
    with pytest.raises(UserError, match=r"model\.vocab_size = 200: must be at least the 257"):
        train(small, tmp_path, progress=False)


@pytest.mark.parametrize("checkpoint, step", [("last", 6), ("best", 6), ("4", 4)])
def test_a_loaded_model_is_the_one_that_was_trained(config, whole, checkpoint, step):
    result, workdir = whole
    loaded = load_model(workdir, checkpoint)
    assert loaded.step == step and loaded.config == config
    if step == 6:
        chex.assert_trees_all_equal(result.state.params, loaded.variables["params"])
        chex.assert_trees_all_equal(result.state.tables, loaded.variables["memory"])
        found = Evaluator(loaded.config, _corpus(config))(loaded.variables)
        assert found.loss == result.validation_loss
        assert found.bits_per_byte == result.validation_bits_per_byte


def test_a_step_that_is_not_there_is_refused(whole):
    with pytest.raises(UserError, match=r"checkpoint = '5': allowed are 'last', 'best' and the steps"):
        load_model(whole[1], "5")


def test_a_trained_tokenizer_stays_with_the_run(config, tmp_path):
    data = replace(config.data, tokenizer="bpe", bpe_vocab_size=280)
    model = replace(config.model, vocab_size=280)
    bpe = RunConfig(model, data, replace(config.train, steps=1))
    result = train(bpe, tmp_path, progress=False)
    tokenizer = load_model(tmp_path).tokenizer
    ids = tokenizer.encode(b"memory slot")
    assert len(ids) < 11 and tokenizer.decode(ids) == b"memory slot"
    # Two batches spread over the split: the bytes are those of their targets.
    batches = eval_batches(_corpus(bpe), "validation", bpe.train.batch_size, bpe.train.eval_batches)
    targets = np.concatenate([batch["tokens"][:, 1:][batch["mask"] > 0] for batch in batches])
    num_bytes = sum(len(tokenizer.decode([target])) for target in targets)
    assert num_bytes > 1.2 * len(targets)
    expected = result.validation_loss * len(targets) / np.log(2) / num_bytes
    assert result.validation_bits_per_byte == pytest.approx(expected)


def test_a_config_survives_json(config):
    assert run_config_from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_configs_of_older_versions_can_be_read(config):
    today = to_dict(config)
    parts = dict(today["model"]["memories"]["memory"])
    # One dict for a memory, as up to version 0.2, and older still: without fields that came later.
    memory = parts.pop("address") | parts.pop("readout") | {"placement": parts["placement"]}
    table = parts.pop("table")
    memory |= {"value_dim": table["value_dim"], "table_sharing": "none", "table_dtype": "float32"}
    del memory["kind"], memory["norm_keys"]
    memory["norm_query_key"] = memory.pop("norm_query")
    model = {name: value for name, value in today["model"].items() if name != "memories"}
    old = today | {"model": model | {"memory": memory}}
    del old["mesh"]
    assert checkpoint_reading.saved_config(pathlib.Path("1"), old) == config
    assert checkpoint_reading.saved_config(pathlib.Path("1"), today) == config


def _corpus(config):
    from ultramem_jax.data import load_corpus

    return load_corpus(config.data)
