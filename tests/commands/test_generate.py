"""`launch.py generate`: the text of the library's generator, on standard output as it comes."""

import io
import os
import sys

import jax
import numpy as np
import pytest

from tests.support.small_run import train_tiny
from ultramem_jax.commands import continuations
from ultramem_jax.commands.continuations import write, write_continuations
from ultramem_jax.config import ModelConfig
from ultramem_jax.data import ByteTokenizer
from ultramem_jax.models.generation import ENDED, Generator, continue_texts, text_generator
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.models.transformer import Transformer
from ultramem_jax.training.restore import load_model


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    return train_tiny(folder, folder / "run", num_keys=8, steps=2)


@pytest.fixture
def generate(run, workdir):
    def generate(*flags):
        status, out, err = run("generate", f"--workdir={workdir}", *flags)
        assert status == 0, err
        return out, err

    return generate


def _expected(workdir, prompts, num_tokens, window=16, **sampling):
    run = load_model(workdir)
    options = dict(window=window, sampling=Sampling(**sampling))
    generator = text_generator(run.config.model, run.variables, run.tokenizer, **options)
    return continue_texts(generator, run.tokenizer, prompts, num_tokens)


def test_what_streams_is_the_text_of_the_library(generate, workdir):
    out, err = generate("--prompt=the ", "--num_tokens=40")
    (text,) = _expected(workdir, ["the "], 40, temperature=0.7)
    assert out == f"the {text}\n"
    summary = err.splitlines()[-1]
    assert summary.startswith("40 tokens in ") and "tokens per second" in summary


def test_several_prompts_are_one_batch_and_printed_in_order(generate, workdir):
    prompts = ["read", "", "é\n"]
    flags = [f"--prompt={prompt}" for prompt in prompts]
    out, err = generate(*flags, "--num_tokens=5", "--top_p=0.9", "--window=6")
    texts = _expected(workdir, prompts, 5, window=6, temperature=0.7, top_p=0.9)
    assert out == f"'read':\nread{texts[0]}\n\n'':\n{texts[1]}\n\n'é\\n':\né\n{texts[2]}\n"
    assert "15 tokens in" in err


def test_a_seed_gives_the_same_text_again_and_another_seed_another(generate):
    first, again, other = (generate("--num_tokens=12", f"--seed={seed}")[0] for seed in (3, 3, 4))
    assert first == again != other
    assert first.startswith("def ")


def test_the_likeliest_of_one_is_the_likeliest_of_all(generate):
    flags = ["--num_tokens=9", "--cache_dtype=bfloat16"]
    assert generate(*flags, "--top_k=1")[0] == generate(*flags, "--temperature=0")[0]


class Recorded:
    """A generator of tokens that come at given times, and the clock that shows them."""

    def __init__(self, times, sequences=1):
        self._times, self._sequences = iter(times), sequences

    def perf_counter(self):
        return next(self._times)

    def stream(self, prompts, num_tokens, seed=0):
        for _ in range(num_tokens):
            yield np.zeros(self._sequences, np.int32)


@pytest.mark.parametrize(
    "times, sequences, summary",
    [
        # The first three tokens compile. Three more in 0.3 s are ten a second, of each sequence.
        (
            [0, 4, 4.1, 7, 7.1, 7.2, 7.3],
            1,
            "6 tokens in 7.3 s: 7.0 s with compiling, then 10.0 tokens per second",
        ),
        (
            [0, 4, 4.1, 7, 7.1, 7.2, 7.3],
            4,
            "24 tokens in 7.3 s: 7.0 s with compiling, then 40.0 tokens per second",
        ),
        ([0, 4, 4.1, 7], 1, "3 tokens in 7.0 s with compiling"),
        ([0, 4], 1, "1 tokens in 4.0 s with compiling"),
    ],
)
def test_the_rate_leaves_compilation_out(monkeypatch, times, sequences, summary):
    recorded = Recorded(times, sequences)
    monkeypatch.setattr(continuations.time, "perf_counter", recorded.perf_counter)
    timed = continuations._Timed(recorded)
    assert len(list(timed.stream([[1]] * sequences, len(times) - 1))) == len(times) - 1
    assert timed.summary() == summary


@pytest.mark.parametrize("length", [1, 7, 8, 12])
def test_nothing_is_compiled_in_the_time_that_the_rate_is_of(length):
    # Prompts shorter than the window, one token short of it, as long, and longer.
    config = ModelConfig(embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8)
    variables = Transformer(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))
    generator = Generator(config, variables, window=8)
    programs = (generator._read_chunk, generator._choose, generator._step)
    compiled = [
        sum(program._cache_size() for program in programs) for _ in generator.stream([[1] * length], 12)
    ]
    assert set(compiled[continuations._COMPILING - 1 :]) == {3}


BAD = {
    "no share of probability": ("--top_p=0", "top_p = 0.0", "(0, 1]"),
    "more than all": ("--top_p=1.5", "top_p = 1.5", "(0, 1]"),
    "a cache of another dtype": ("--cache_dtype=int8", "--cache_dtype=int8", "float32|bfloat16"),
    "fewer than no tokens": ("--top_k=-1", "--top_k=-1", "non-negative"),
    "no tokens": ("--num_tokens=0", "--num_tokens=0", "positive"),
    "a negative seed": ("--seed=-1", "--seed=-1", "[0, 4294967295]"),
    "an endless temperature": ("--temperature=inf", "temperature = inf", "finite"),
    "a negative window": ("--window=-1", "--window=-1", "non-negative"),
    "no run": ("--workdir=nowhere", "no directory", "nowhere"),
    "no such step": ("--checkpoint=7", "--checkpoint = '7'", "'last'", "steps 2"),
    "a step in full-width digits": ("--checkpoint=２", "--checkpoint = '２'", "'last'", "steps 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_gets_one_line_that_says_what_is_allowed(run, workdir, case):
    flag, *said = BAD[case]
    status, out, err = run("generate", f"--workdir={workdir}", flag)
    assert status == 2 and out == ""
    (message,) = err.splitlines()
    assert message.startswith("error: ") and all(words in message for words in said), message


class Fixed:
    """Tokens that are known, and what had been printed when each was asked for."""

    def __init__(self, rows, capsys=None):
        self.rows, self.capsys, self.printed = rows, capsys, []

    def stream(self, prompts, num_tokens, seed):
        for row in self.rows:
            self.printed.append(self.capsys.readouterr().out if self.capsys else None)
            yield np.array(row, np.int32)


def test_every_piece_is_out_before_the_next_token_is_asked_for(capsys):
    fixed = Fixed([[byte] for byte in "aé".encode()] + [[ord("b")], [ENDED]], capsys)
    summary = write_continuations(fixed, ByteTokenizer(), ["> "], 4)
    assert fixed.printed == ["> ", "a", "", "é", "b"]  # é is of two bytes
    assert capsys.readouterr().out == "\n"
    assert summary.startswith("4 tokens in ")


def test_a_text_that_ends_at_once_has_no_tokens(capsys):
    assert write_continuations(Fixed([[ENDED]]), ByteTokenizer(), ["> "], 4).startswith("0 tokens in ")
    assert capsys.readouterr().out == "> \n"


def test_what_the_encoding_does_not_have_is_a_question_mark(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="latin-1"))
    # A prompt with a byte that is no UTF-8 has a lone surrogate, which no encoding has.
    write("é \ufffd \udcff")
    assert out.getvalue() == "é ? ?".encode("latin-1")


def test_a_reader_that_has_gone_ends_it_quietly(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as ended:
            write("text")
        assert ended.value.code == 0
