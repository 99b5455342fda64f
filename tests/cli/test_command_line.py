"""The command line as a user meets it: what runs, and the one line that bad input gets."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from experiments import EXPERIMENTS
from tests.support.programs import TINY
from ultramem_jax.commands import COMMANDS
from ultramem_jax.config import MoEConfig, RunConfig
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.presets import PRESETS, preset
from ultramem_jax.training import loop
from ultramem_jax.training.metrics import MetricWriter, read_metrics


def test_without_arguments_it_lists_commands_and_experiments(run):
    status, out, _ = run()
    assert status == 0
    for name, command in (COMMANDS | EXPERIMENTS).items():
        assert f"  {name} " in out and command.summary in out


@pytest.mark.parametrize("name", COMMANDS | EXPERIMENTS)
def test_every_command_has_help(run, name):
    status, out, _ = run(name, "--help")
    assert status == 0 and "--" in out
    assert len(out.splitlines()[0]) > 20
    assert max(map(len, out.splitlines())) <= 110


def test_help_offers_what_is_not_refused(run):
    _, out, _ = run("train", "--help")
    assert "--preset" in out and "--config.part.field" in out
    _, out, _ = run("ablate", "--help")
    assert "--preset" not in out and "--config.part.field" not in out
    assert "--config.train.field" in out and "--config.model.dtype" in out and "--scale" in out
    # Of its models it takes the dtype alone, so that their fields are not offered.
    assert "--config.train: steps=400 " in out and "--config.data: " in out and "seq_len=128" in out
    assert "--config.model:" not in out and "--config.model.memories" not in out and "num_keys=" not in out


def test_help_names_every_preset_and_every_field_with_its_value(run):
    _, out, _ = run("train", "--help")
    presets, fields = out.split("Presets:")[1].split("Fields, with their values here:")
    assert set(presets.split()) - {"--preset:"} == set(PRESETS)
    base = RunConfig(model=preset("ultramem-tiny"))
    memory, path = base.model.memory, "model.memories.ultramem"
    parts = {"model": base.model, path: memory, "model.moe": MoEConfig()}
    parts |= {f"{path}.{part}": getattr(memory, part) for part in ("address", "table", "readout")}
    parts |= {"data": base.data, "train": base.train, "mesh": base.mesh}
    shown = fields.split()
    for name, part in parts.items():
        assert f"--config.{name}:" in shown
        for field in dataclasses.fields(part):
            if f"{name}.{field.name}" not in parts and field.name != "memories":
                assert f"{field.name}={getattr(part, field.name)}" in shown
    _, out, _ = run("bench_decode", "--help")
    assert "Presets:" not in out


def test_train_evaluate_generate(run, text, tmp_path):
    two_memories = ["--config.model.num_layers=2", "--config.model.memory.placement=1:1/2:2"]
    status, out, err = run("train", *TINY, *two_memories, *text, f"--workdir={tmp_path}", "--sample=5")
    assert status == 0, err
    assert "bits per byte" in out and "continuation" in out and "launch.py evaluate" in out
    assert (tmp_path / "loss_curve.png").stat().st_size > 10_000
    status, out, err = run("evaluate", f"--workdir={tmp_path}", "--batches=2")
    assert status == 0 and out.startswith(f"step 2 of {tmp_path}, corpus "), err
    validation, test = _table(out)
    recorded = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert recorded["split"] == "validation"
    assert validation["split"] == "validation" and test["split"] == "test"
    # Two batches of eight sequences of 16 targets.
    assert validation["tokens scored"] == test["tokens scored"] == "256"
    assert validation["context"] == test["context"] == "1 to 16 tokens, stride 16"
    assert validation["nats/token"] == f"{recorded['loss']:.4f}"
    assert validation["bits/byte"] == f"{recorded['bits_per_byte']:.4f}"
    assert float(validation["perplexity/token"]) == pytest.approx(np.exp(recorded["loss"]), rel=1e-3)
    status, out, err = run("evaluate", f"--workdir={tmp_path}", "--stride=5", "--splits=validation")
    assert status == 0, err
    (row,) = _table(out)
    # 370 bytes and the end of the document: 370 targets, 16 of them and then 70 times five.
    assert row["tokens scored"] == "366" and row["context"] == "12 to 16 tokens, stride 5"
    assert row["nats/token"] != validation["nats/token"]
    _, out, _ = run(
        "evaluate", f"--workdir={tmp_path}", "--stride=5", "--splits=validation", "--batch_size=5"
    )
    assert _table(out) == [row]
    status, _, err = run("evaluate", f"--workdir={tmp_path}", "--stride=17")
    assert status == 2 and err.splitlines()[-1].startswith("error: --stride = 17: must be in [1, 16]")
    status, out, err = run("generate", f"--workdir={tmp_path}", "--prompt=the ", "--num_tokens=4")
    assert status == 0 and out.startswith("the "), err
    again = run("generate", f"--workdir={tmp_path}", "--prompt=the ", "--num_tokens=4")[1]
    assert out == again


def _table(out):
    """The rows of a table in Markdown, by column, which is the end of what was printed."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line[0] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_config_file_a_preset_and_overrides_in_any_order(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", make_mesh)  # of all eight devices
    file = tmp_path / "config.py"
    file.write_text(
        "from ultramem_jax import *\n"
        "def get_config():\n"
        "    return RunConfig(train=TrainConfig(steps=3, batch_size=8, eval_batches=1))\n"
    )
    mesh = ["--config.mesh.batch_over_memory=false", "--mesh=fsdp:2,data:0"]
    flags_in_odd_order = [*mesh, "--config.train.steps=1", *TINY[1:-2], f"--config={file}", TINY[0]]
    status, out, err = run("train", *flags_in_odd_order, *text, f"--workdir={tmp_path}", "--sample=3")
    assert status == 0, err
    assert "a continuation of 'def ':\ndef " in out  # by one device of the eight
    meta = next((tmp_path / "checkpoints" / "1").rglob("meta/*"))
    config = json.loads(meta.read_text())["config"]
    assert config["train"]["steps"] == 1 and config["train"]["batch_size"] == 8
    assert config["model"]["memories"]["ultramem"]["address"]["num_keys"] == 16
    split = {"data": 0, "fsdp": 2, "tensor": 1, "memory": 1, "width": 1}
    assert config["mesh"] == split | {"batch_over_memory": False}
    status, out, err = run("evaluate", f"--workdir={tmp_path}", "--batches=1", "--splits=validation")
    assert status == 0, err
    recorded = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert float(_table(out)[0]["nats/token"]) == pytest.approx(recorded["loss"], abs=2e-4)


def test_evaluation_refuses_another_corpus(run, text, tmp_path):
    path = pathlib.Path(text[1].partition("path=")[2])
    copy = [text[0], f"--config.data.path={tmp_path / 'copy.txt'}", text[2]]
    (tmp_path / "copy.txt").write_text(path.read_text())
    status, _, err = run("train", *TINY, *copy, f"--workdir={tmp_path / 'run'}")
    assert status == 0, err
    assert err.count("corpus ") == 1  # every message once
    (tmp_path / "copy.txt").write_text(path.read_text().upper())
    status, _, err = run("evaluate", f"--workdir={tmp_path / 'run'}")
    assert status == 2 and "was trained on" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "text, said",
    [
        ("def get_config(: pass", "SyntaxError"),
        (
            "get_conf = 1",
            "must define get_config(), a function that takes no arguments and returns a RunConfig",
        ),
        ("get_config = 1", "must define get_config(), a function that takes no arguments"),
        ("def get_config(seed): return seed", "must define get_config(), a function that takes no arguments"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("def get_config(): raise SystemExit('no\\nmore')", "SystemExit: no more"),
        ("get_config = '\\0'\0", "null bytes"),
        ("def get_config(): return get_config()", "RecursionError"),
        ("def get_config(): return {}", "must return a RunConfig"),
        ("from ultramem_jax import *\ndef get_config(): return TrainConfig(stepz=3)", "stepz"),
        ("from ultramem_jax import *\ndef get_config(): return TrainConfig(steps=0)", "steps = 0"),
    ],
)
def test_a_config_file_that_cannot_be_used_gets_one_line(run, tmp_path, text, said):
    (tmp_path / "config.py").write_text(text)
    status, _, err = run("train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}")
    assert status == 2 and len(err.strip().splitlines()) == 1 and said in err
    assert f"--config = {str(tmp_path / 'config.py')!r}: " in err or "TrainConfig" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, flags", [("train", []), ("compare", ["--systems=dense", "--seeds=1"])])
def test_sigterm_ends_with_a_status_of_its_own(run, text, tmp_path, monkeypatch, name, flags):
    monkeypatch.setattr(MetricWriter, "write", lambda *_: signal.raise_signal(signal.SIGTERM))
    command = [name, *flags, *TINY, *text, "--config.train.log_every=1", f"--workdir={tmp_path}"]
    status, out, err = run(*command)
    assert status == 75 and "Traceback" not in err
    assert out.splitlines()[-1].endswith("the same command goes on from there")


def test_a_run_whose_log_was_lost_is_finished_all_the_same(run, text, tmp_path):
    command = ["train", *TINY, *text, f"--workdir={tmp_path}"]
    assert run(*command)[0] == 0
    (tmp_path / "metrics.jsonl").unlink()
    status, out, err = run(*command)
    assert status == 0 and "no loss curve" in out and "already finished: step 2" in err


@pytest.mark.parametrize("text", ["raise KeyboardInterrupt", "def get_config(): raise KeyboardInterrupt"])
def test_a_config_file_can_be_interrupted(run, tmp_path, text):
    (tmp_path / "config.py").write_text(text)
    assert run("train", f"--config={tmp_path / 'config.py'}")[::2] == (130, "interrupted\n")


def test_compare_writes_table_and_figure_and_goes_on_where_it_was(run, text, tmp_path):
    arguments = [*TINY, *text, f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]
    arguments += ["--config.train.eval_every=1", "--seeds=1", "--test_batches=1"]
    arguments += ["--systems=dense,ultramem"]
    status, _, err = run("compare", *arguments)
    assert status == 0, err
    table = (tmp_path / "results" / "compare.md").read_text()
    assert "| dense" in table and "| ultramem" in table and "launch.py compare" in table
    assert (tmp_path / "results" / "compare.csv").exists()
    assert (tmp_path / "results" / "compare.png").stat().st_size > 10_000
    written = (tmp_path / "runs" / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns
    status, _, err = run("compare", *arguments)
    assert status == 0, err
    assert (tmp_path / "runs" / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns == written
    status, _, err = run("compare", *arguments, "--mesh=data:4,fsdp:2")  # wherever it was trained
    assert status == 0, err
    assert (tmp_path / "runs" / "dense-seed0" / "metrics.jsonl").stat().st_mtime_ns == written
    status, _, err = run("compare", *arguments, "--config.train.learning_rate=0.5")
    assert status == 2 and "another config" in err
    result = tmp_path / "runs" / "dense-seed0" / "result.json"
    made = json.loads(result.read_text())
    for change, expected in (({}, 0), ({"tokenizer_hash": "0"}, 2)):  # older ones do not say which
        result.write_text(json.dumps({k: v for k, v in made.items() if k != "tokenizer_hash"} | change))
        status, _, err = run("compare", *arguments)
        assert status == expected and ("another config, corpus, tokenizer" in err) == bool(expected)


def test_count_lists_every_preset(run):
    from ultramem_jax.presets import PRESETS

    status, out, _ = run("count")
    assert status == 0 and all(name in out for name in PRESETS)
    status, out, _ = run("count", "--preset=dense-tiny,moe-tiny")
    assert status == 0 and "dense-tiny" in out and "pkm-tiny" not in out


M = "--config.model.memory."
ABLATE_151M = "--config=experiments/configs/ablate_151m.py"
BAD = {
    "unknown experiment": (["trian"], "'trian'", "'train'"),
    "unknown flag": (["train", "--wrokdir=x"], "wrokdir", "workdir"),
    "unknown preset": (["train", "--preset=ultramem-tny"], "ultramem-tny", "'ultramem-tiny'"),
    "unknown config key": (["train", f"{M}topm=4"], "topm", "'top_m'"),
    "unknown config part": (["train", "--config.modle.dropout=0.1"], "modle", "'model'"),
    "a part that is not there": (["train", "--preset=dense-tiny", f"{M}top_m=4"], "model.memory", "has none"),
    "a part instead of a field": (["train", "--config.model.memory=4"], "model.memory", "memories"),
    "a value of another type": (["train", f"{M}top_m=many"], "top_m", "many"),
    "no such config file": (["train", "--config=experiments/configs/compre.py"], "compre.py", "compare.py"),
    "no such recipe": (["train", "--config=dmo"], "'dmo'", "'demo'"),
    "unknown dataset": (["train", "--config.data.dataset=enwik9"], "enwik9", "'enwik8'"),
    "missing corpus": (
        ["train", "--config.data.dataset=text", "--config.data.path=/no/such"],
        "data.path",
        "/no/such",
    ),
    "missing enwik8": (["train", "--config.data.dataset=enwik8"], "data.path", "enwik8"),
    "more reads than candidates": (["train", f"{M}num_keys=16", f"{M}top_m=64"], "top_m = 64", "32"),
    "expansion that is no square": (["train", f"{M}expansion=3"], "expansion = 3", "square"),
    "cores that do not divide": (["train", f"{M}num_cores=5"], "value_dim = 64", "5 weights"),
    "malformed placement": (["train", f"{M}placement=1-2"], "placement = '1-2'", "'3:7'"),
    "placement backwards": (["train", f"{M}placement=3:2"], "3:2", "before it starts"),
    "placement beyond the end": (["train", f"{M}placement=2:9"], "2:9", "last layer, 4"),
    "placement from zero": (["train", f"{M}placement=0:1"], "0:1", "layer 1"),
    "micro-batches that do not divide": (
        ["train", "--config.train.grad_accumulation=5"],
        "grad_accumulation = 5",
        "batch_size = 16",
    ),
    "uneven devices": (["train", "--config.train.batch_size=12"], "batch_size = 12", "8 devices"),
    "no run to evaluate": (["evaluate", "--workdir=/no/such"], "/no/such", "no checkpoints"),
    "no run to generate from": (["generate", "--workdir=/no/such"], "/no/such", "no checkpoints"),
    "an unknown split": (["evaluate", "--splits=validation,tset"], "'tset'", "'test'"),
    "no split": (["evaluate", "--splits="], "--splits = ''", "validation"),
    "unknown system": (["compare", "--systems=dens"], "'dens'", "'dense'"),
    "base without a memory": (["compare", "--preset=dense-tiny"], "memory", "base"),
    "no system": (["compare", "--systems="], "--systems", "dense"),
    "rotary base of zero": (["train", "--config.model.rope_theta=0"], "rope_theta = 0", "above 1"),
    "a workdir that is a file": (
        ["train", "--workdir=experiments/__init__.py"],
        "--workdir",
        "folder",
    ),
    "ablation of an unknown part": (["ablate", "--parts=laddr"], "'laddr'", "'ladder'"),
    "ablation of nothing": (["ablate", "--parts="], "--parts", "ladder"),
    "ablation of a preset": (["ablate", "--preset=dense-tiny"], "--scale", "dtype"),
    "ablation of another width": (["ablate", "--config.model.embed_dim=64"], "--scale", "dtype"),
    "the paper's sizes without a config": (["ablate", "--scale=151m"], "151m", ABLATE_151M),
    "the paper's sizes with the tiny config": (
        ["ablate", "--scale=151m", "--config=experiments/configs/ablate.py", "--config.train.steps=9"],
        "151m",
        ABLATE_151M,
    ),
    "an unknown scale": (["ablate", "--scale=680m"], "scale", "151m"),
    "a flag without its value": (["train", "--preset"], "--preset", "VALUE"),
    "a stray argument": (["count", "all"], "'all'", "--name=value"),
    "an unknown axis": (["train", "--mesh=data:4,memry:2"], "memry", "did you mean 'memory'?", "fsdp"),
    "a mesh without sizes": (["train", "--mesh=data"], "--mesh = 'data'", "AXIS:SIZE", "tensor"),
    "a mesh in full-width digits": (["train", "--mesh=data:４"], "'data:４'", "AXIS:SIZE", "tensor"),
    "batches in full-width digits": (
        ["bench_decode", "--batches=４"],
        "batches = '４'",
        "whole numbers above 0",
    ),
    "owners in full-width digits": (["bench_owner", "--parts=４"], "parts = '４'", "whole numbers"),
    "slots in full-width digits": (["bench_step", "--slots=４"], "slots = '４'", "must be a square"),
    "an axis twice": (["train", "--mesh=data:4,data:2"], "'data:4,data:2'", "each once"),
    "a mesh of other devices": (["train", "--mesh=data:3"], "data:3", "there are 8 devices"),
    "a mesh that does not divide": (["train", "--mesh=data:0,tensor:3"], "mesh.tensor = 3", "must divide"),
    "no processes": (["--processes=0", "train"], "--processes = 0", "at least 1"),
    "processes that are no number": (["train", "--processes=two"], "--processes = 'two'", "whole number"),
    "processes for what takes one": (["evaluate", "--processes=2"], "--processes = 2", "'evaluate'", "train"),
    "processes that others start": (
        ["train", "--processes=2", "--coordinator_address=auto"],
        "--processes = 2",
        "--coordinator_address",
    ),
    "a coordinator alone": (["train", "--coordinator_address=a:1"], "--num_processes", "must be given"),
    "no coordinator": (["train", "--num_processes=2", "--process_id=0"], "--coordinator_address", "given"),
    "a coordinator without a port": (
        ["train", "--coordinator_address=host", "--num_processes=2", "--process_id=0"],
        "--coordinator_address = 'host'",
        "HOST:PORT",
    ),
    "a process that is none of them": (
        ["train", "--coordinator_address=a:1", "--num_processes=2", "--process_id=2"],
        "--process_id = 2",
        "[0, 2)",
    ),
    "no time for heartbeats": (
        ["train", "--coordinator_address=auto", "--heartbeat_timeout=0"],
        "--heartbeat_timeout = 0",
        "at least 1",
    ),
    "a number beside auto": (
        ["train", "--coordinator_address=auto", "--process_id=0"],
        "--process_id = 0",
        "auto",
    ),
    "nobody at the address": (
        [
            "train",
            "--coordinator_address=127.0.0.1:1",
            "--num_processes=2",
            "--process_id=1",
            "--initialization_timeout=1",
        ],
        "--coordinator_address = '127.0.0.1:1'",
        "does not answer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_that_names_it_and_what_is_allowed(run, case, tmp_path, monkeypatch):
    argv, *said = BAD[case]
    monkeypatch.setattr(loop, "make_mesh", make_mesh)  # of all eight devices, which some of it is about
    root = pathlib.Path(__file__).parents[2]
    (tmp_path / "experiments").symlink_to(root / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ULTRAMEM_CACHE", str(tmp_path / "cache"))
    status, _, err = run(*argv)
    message = err.strip().splitlines()
    assert status == 2 and message[-1].startswith("error: ")
    assert all(words in message[-1] for words in said), message[-1]
    assert "Traceback" not in err
    # The stdlib corpus may have been tokenized on the way; nothing else was written.
    left = {p.name for p in tmp_path.iterdir()} - {"experiments", "cache"}
    assert not left


def test_a_corpus_shorter_than_a_sequence_is_refused(run, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    status, _, err = run(
        "train",
        "--config.data.dataset=text",
        f"--config.data.path={tmp_path / 'short.txt'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    assert status == 2 and "data.seq_len = 256" in err.splitlines()[-1]


def test_twenty_million_slots_are_in_the_config_of_that_name():
    from experiments.configs import slots_20m
    from ultramem_jax.accounting import row_bytes

    config = slots_20m.get_config()
    slots = sum(config.model.sites[0].layout.num_slots)
    assert slots >= 20_000_000
    assert slots * row_bytes(config.model.memory.table, config.train).total < 6e9


def test_launch_starts_again_with_huge_pages_and_keeps_the_exit_status():
    launch = str(pathlib.Path(__file__).parents[2] / "launch.py")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for tunables in ({}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}):
        done = subprocess.run(
            [sys.executable, launch, "nothing"], env=environment | tunables, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count("error: unknown command 'nothing'") == 1
