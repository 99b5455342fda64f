"""The commands of docs/guides: those of most run, on smaller models; of all every flag is parsed."""

import contextlib
import math
import sys

import pytest

from tests.support.documents import GUIDES, python_blocks, write_files
from tests.support.fixtures import one_device, standard_promotion  # noqa: F401
from tests.support.guides import DEVICES, commands, smaller
from tests.support.programs import on_one_device  # noqa: F401
from ultramem_jax.cli import command_line, local_processes
from ultramem_jax.config.memory_kinds import ADDRESSERS
from ultramem_jax.parallel.mesh import AXES
from ultramem_jax.training.metrics import read_metrics


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
