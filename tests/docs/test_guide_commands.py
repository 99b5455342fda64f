"""The commands of docs/guides: those of two guides run, on smaller models; of all every flag is parsed."""

import contextlib
import math
import re
import sys

import pytest

from tests.support.documents import GUIDES, python_blocks, shell_commands, write_files
from tests.support.fixtures import one_device, standard_promotion  # noqa: F401
from tests.support.programs import on_one_device  # noqa: F401
from ultramem_jax.cli import command_line, local_processes
from ultramem_jax.commands import COMMANDS
from ultramem_jax.config.memory_kinds import ADDRESSERS
from ultramem_jax.parallel.mesh import AXES
from ultramem_jax.training.metrics import read_metrics

SMALL = (
    *("embed_dim=32", "num_layers=2", "num_heads=2", "num_kv_heads=2", "mlp_dim=32"),
    *("memory.placement=1:2", "memory.num_keys=16", "memory.value_dim=8"),
)
QUICK = ("batch_size=4", "eval_batches=1", "log_every=1")
STEPS = re.compile(r"--config\.train\.steps=(\d+)")
DEVICES = 8
"""Of a process, in the guide to many devices."""


def _commands(guide):
    """Yields the commands of a guide, without what starts them and without settings of the shell."""
    for words in shell_commands(GUIDES / f"{guide}.md"):
        if words[0] == "ultramem":
            assert words[1] in COMMANDS, words
            yield words[1:]
        elif words[:2] == ["python", "launch.py"]:
            yield words[2:]
        elif words[:3] == ["python", "-m", "ultramem_jax"]:
            yield words[3:]
        elif words[:2] == ["python", "-c"]:
            assert "ultramem_jax.__main__" in words[2], words
            yield words[3:]
        else:
            assert words == ["export", f"JAX_NUM_CPU_DEVICES={DEVICES}"], words


def _smaller(words):
    """The same command, with a 500th of the steps and, if it trains, a model that compiles in seconds."""
    if words[0] != "train":
        return words
    words = [STEPS.sub(lambda m: f"--config.train.steps={int(m[1]) // 500}", word) for word in words]
    model, train = (
        (f"--config.model.{field}" for field in SMALL),
        (f"--config.train.{field}" for field in QUICK),
    )
    return [*words, *model, *train]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with texts in it."""
    texts = tmp_path / "my_text"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(
            f"Once slot {number} of a key was read by query {number**2}. " * 20
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ULTRAMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_text_is_trained_evaluated_and_continued(run, folder):
    guide = "train_your_own_text"
    metrics, config = python_blocks(GUIDES / f"{guide}.md")
    (folder / "my_run.py").write_text(config)
    shown = {}
    for words in [*_commands(guide), *_commands("decode_and_serve")]:
        if "--config=experiments/configs/slots_20m.py" in words:
            continue  # 20 M slots: too many for a test
        status, out, err = run(*_smaller(words))
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
    train, evaluate = _commands("add_a_memory")
    short = ("train.steps=2", "train.batch_size=4", "train.eval_batches=1", "data.seq_len=16")
    status, _, err = run(*train, *text, *(f"--config.{field}" for field in short))
    assert status == 0, err
    status, out, err = run(*evaluate)
    assert status == 0 and "bits/byte" in out, err


@pytest.mark.parametrize("guide", sorted(path.stem for path in GUIDES.glob("*.md")))
def test_every_flag_is_one_and_every_config_fits_its_mesh(guide, run, own_memory, monkeypatch, tmp_path):
    """Nothing runs: in place of a command's `main` its config is made, and no process is joined."""
    parsed, parse = [], command_line.run

    def only_parsed(main, argv, usage, base, together):
        def made():
            parsed.append(base and command_line.run_config())

        return parse(made, argv, usage, base, together)

    monkeypatch.setattr(command_line, "run", only_parsed)
    monkeypatch.setattr(command_line, "_joined", lambda member, logger: contextlib.nullcontext())
    (tmp_path / "experiments").symlink_to(GUIDES.parents[1] / "experiments")
    write_files(GUIDES / f"{guide}.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = list(_commands(guide))
    for words in commands:
        processes, words = local_processes.take_processes(words)
        if any(word.startswith("--coordinator_address") for word in words):
            processes = 2
        status, _, err = run(*(word.replace("HOST:PORT", "host:1234") for word in words))
        assert status == 0, (words, err)
        if words[0] == "train":
            sizes = [max(getattr(parsed[-1].mesh, axis), 1) for axis in AXES]
            assert DEVICES * processes % math.prod(sizes) == 0, words
    assert len(parsed) == len(commands)
