"""The harness's own numbers of a tiny model, against those that full passes in float64 give by hand."""

import importlib
import json
import math
import pathlib
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml

from tests.support.absent import take_away
from tests.support.drawn import variables_of
from ultramem_jax.config import ModelConfig
from ultramem_jax.data import BpeTokenizer, ByteTokenizer
from ultramem_jax.errors import UserError
from ultramem_jax.interop.paper_tasks import PAPER_TASKS, expanded
from ultramem_jax.models import Transformer

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from ultramem_jax.interop import lm_eval_tasks  # noqa: E402
from ultramem_jax.interop.lm_eval import UltramemLM  # noqa: E402
from ultramem_jax.interop.lm_eval_tasks import evaluate_tasks, result_rows  # noqa: E402

WINDOW, EOS = 32, 256
CONFIG = ModelConfig(
    vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=16, tie_embeddings=False
)
FULL_PASS = jax.jit(Transformer(CONFIG).apply)


@pytest.fixture(scope="module")
def variables():
    drawn = variables_of(CONFIG, seed=4)
    # Letters, or the end of a document, are the likeliest, so that what is generated is text.
    gain = np.full(257, 0.1, np.float32)
    gain[list(b"abcdefgh")], gain[EOS] = 4, 3
    drawn["params"]["output"] = drawn["params"]["output"] * gain[None]
    return drawn


@pytest.fixture(scope="module")
def model(variables):
    return UltramemLM(CONFIG, variables, ByteTokenizer(), max_length=WINDOW, batch_size=4)


@pytest.fixture(scope="module")
def log_softmax(variables):
    """(L, 257) float64, of the token after each of up to WINDOW ids. Zeros follow, which they do not see."""

    def log_softmax(ids):
        padded = np.zeros((1, WINDOW), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(FULL_PASS(variables, padded)[0, : len(ids)], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return log_softmax


@pytest.fixture(scope="module")
def likelihood(log_softmax):
    """The log-probability of a continuation, and whether it is greedy; the context is cut from the left."""

    def likelihood(context, continuation):
        ids = [*context, *continuation][-WINDOW - 1 :]
        found = log_softmax(ids[:-1])[-len(continuation) :]
        total = sum(found[i, token] for i, token in enumerate(continuation))
        return total, found.argmax(-1).tolist() == list(continuation)

    return likelihood


@pytest.fixture(scope="module")
def continued(log_softmax):
    """The likeliest bytes after a prompt, up to the end of the document."""

    def continued(prompt, count):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(log_softmax(ids)[-1].argmax()))
            if ids[-1] == EOS:
                break
        return bytes(i for i in ids[len(prompt) :] if i != EOS)

    return continued


def _instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


class Tasks:
    """Writes tasks and their documents, which the harness reads from a folder."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, name, documents, **fields):
        data = self.folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(self.folder / "cache")},
            "test_split": "test",
            **fields,
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    import datasets

    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "huggingface", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return Tasks(tmp_path)


CHOICES = [
    {"question": "bad", "choices": ["abc", "hge", "fade"], "answer": 1},
    {"question": "wie schön", "choices": ["Bär", "é", "漢字"], "answer": 0},
    {
        "question": "a question of more bytes than the window of the model",
        "choices": ["yes", "no"],
        "answer": 1,
    },
    {"question": "bad", "choices": ["abc", "hge", "fade"], "answer": 0},  # the requests of the first again
    {"question": "", "choices": ["abc", "de"], "answer": 0},
    {"question": "spaces  ", "choices": ["a", "b"], "answer": 0},
]


def test_choices_are_those_with_the_largest_likelihood(model, tasks, likelihood):
    tasks.write(
        "choices",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    results = evaluate_tasks(model, ["choices"], tasks.folder, log_samples=True)

    right = {"acc": [], "acc_norm": []}
    for document, sample in zip(CHOICES, results["samples"]["choices"], strict=True):
        totals = []
        for choice, ((answer,),) in zip(document["choices"], zip(sample["resps"]), strict=True):
            # Blanks at the end of a context belong to the continuation.
            context = document["question"].rstrip()
            continuation = (document["question"] + " " + choice)[len(context) :]
            expected = likelihood(context.encode() or [EOS], continuation.encode())
            assert answer[0] == pytest.approx(expected[0], rel=1e-5)
            assert answer[1] is expected[1]
            totals.append(expected[0])
        lengths = [len(choice) for choice in document["choices"]]
        right["acc"].append(np.argmax(totals) == document["answer"])
        right["acc_norm"].append(np.argmax(np.divide(totals, lengths)) == document["answer"])
    rows = {row["metric"]: row for row in result_rows(results)}
    assert rows.keys() == right.keys()
    for metric, row in rows.items():
        assert row["task"] == "choices" and row["n"] == 6
        assert row["value"] == pytest.approx(np.mean(right[metric]))
        assert row["stderr"] == pytest.approx(np.std(right[metric], ddof=1) / math.sqrt(6))
    assert 0 < rows["acc"]["value"] < 1


TEXTS = [
    "a few words",
    "un été à la plage, et une phrase plus longue que deux fenêtres du modèle entier",
    "b",
    "b",
]


def test_perplexities_are_those_of_rolling_windows(model, tasks, likelihood):
    tasks.write(
        "texts",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    rows = {row["metric"]: row for row in result_rows(evaluate_tasks(model, ["texts"], tasks.folder))}
    total = sum(
        likelihood(*make_disjoint_window(window))[0]
        for text in TEXTS
        for window in get_rolling_token_windows(list(text.encode()), EOS, WINDOW, context_len=1)
    )
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    num_words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert rows["word_perplexity"]["value"] == pytest.approx(math.exp(-total / num_words), rel=1e-5)
    assert rows["byte_perplexity"]["value"] == pytest.approx(math.exp(-total / num_bytes), rel=1e-5)
    assert rows["bits_per_byte"]["value"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-5)
    assert rows["bits_per_byte"]["stderr"] is None
    assert rows["bits_per_byte"]["n"] == 4


def test_generated_answers_are_compared(model, tasks, continued):
    prompts = ["say: ", "häßlich", "a prompt that is longer than what the window leaves", "say: ", "cab"]
    found = [continued(prompt.encode()[-(WINDOW - 6) :], 6).decode() for prompt in prompts]
    documents = [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, found, strict=True)]
    documents[1]["answer"] += "not"
    tasks.write(
        "answers",
        documents,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match"}],
    )
    results = evaluate_tasks(model, ["answers"], tasks.folder, log_samples=True)
    assert [sample["resps"][0][0] for sample in results["samples"]["answers"]] == found
    (row,) = result_rows(results)
    assert (row["metric"], row["value"], row["n"]) == ("exact_match", pytest.approx(0.8), 5)
    assert len(set(found)) == 4


def test_a_limit_and_examples_in_the_prompt(model, tasks, likelihood):
    tasks.write(
        "choices",
        CHOICES,
        output_type="multiple_choice",
        fewshot_split="test",
        fewshot_config={"sampler": "first_n"},
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )
    results = evaluate_tasks(model, ["choices"], tasks.folder, limit=2, num_fewshot=1, log_samples=True)
    assert results["n-samples"]["choices"] == {"original": 6, "effective": 2}
    sample = results["samples"]["choices"][1]
    assert sample["arguments"][1] == ("bad hge\n\nwie schön", " é")
    expected = likelihood("bad hge\n\nwie schön".encode(), " é".encode())
    assert sample["resps"][1][0][0] == pytest.approx(expected[0], rel=1e-5)


def test_a_generation_ends_before_a_stop_string_that_spans_tokens(model, continued):
    prompts = ["say: ", "ab", "häßlich"]
    whole = [continued(prompt.encode(), 12).decode() for prompt in prompts]
    until = [whole[0][4:7], "", "never"]
    requests = [
        _instance("generate_until", prompt, {"until": until, "max_gen_toks": count})
        for prompt, count in [*zip(prompts, [12] * 3, strict=True), (prompts[0], 3), (prompts[0], 12)]
    ]
    ends = [text.partition(until[0])[0] for text in whole]
    assert model.generate_until(requests, disable_tqdm=True) == [*ends, whole[0][:3], ends[0]]
    # The stop string, the end of the document, and the most tokens.
    assert ends[0] == whole[0][:4] and ends[1] == whole[1] and len(whole[1]) < len(ends[2]) == 12


def test_a_generation_longer_than_the_window_keeps_half_of_its_context(model):
    request = _instance("generate_until", "abcd" * 20, {"max_gen_toks": WINDOW + 8})
    (text,) = model.generate_until([request], disable_tqdm=True)
    generator = next(g for way, g in model._generators.items() if way.temperature == 0)
    (ids,) = generator.generate([("abcd" * 4).encode()], WINDOW + 8)
    assert text == bytes(ids.tolist()).decode(errors="replace")


def test_draws_follow_their_arguments(variables, model):
    def texts(model, **arguments):
        request = _instance("generate_until", "abc", {"max_gen_toks": 12, "until": ["\n"], **arguments})
        return model.generate_until([request] * 3, disable_tqdm=True)

    (greedy, *_) = texts(model)
    assert texts(model, do_sample=False, temperature=0.7) == [greedy] * 3
    assert texts(model, do_sample=True, top_k=1) == [greedy] * 3
    drawn = texts(model, do_sample=True, top_p=0.9, top_k=-1)
    assert len(set(drawn)) == 3  # of equal requests
    assert drawn == texts(model, do_sample=True, top_p=0.9, temperature=1.0)
    other = UltramemLM(CONFIG, variables, ByteTokenizer(), max_length=WINDOW, batch_size=4, seed=7)
    other._generators = model._generators  # compiled
    assert texts(other, do_sample=True, top_p=0.9) != drawn


def test_what_a_generation_ignores_is_said(model, caplog):
    arguments = {"max_gen_toks": 1, "num_beams": 4}
    model.generate_until([_instance("generate_until", "abc", arguments)], disable_tqdm=True)
    assert "ignores num_beams" in caplog.text


def test_results_are_offered_to_a_cache(model):
    kept = {}
    model.set_cache_hook(
        SimpleNamespace(add_partial=lambda kind, args, value: kept.update({(kind, args): value}))
    )
    pairs = [_instance("loglikelihood", "ab", " c"), _instance("loglikelihood", "", "d")]
    likelihoods = model.loglikelihood(pairs, disable_tqdm=True)
    (whole,) = model.loglikelihood_rolling([_instance("loglikelihood_rolling", "abc")], disable_tqdm=True)
    assert kept == {
        ("loglikelihood", ("ab", " c")): likelihoods[0],
        ("loglikelihood", ("", "d")): likelihoods[1],
        ("loglikelihood_rolling", ("abc",)): whole,
    }


def test_blanks_alone_and_texts_without_tokens_are_scored(model, likelihood):
    blank, nothing = model.loglikelihood(
        [_instance("loglikelihood", " ", "a"), _instance("loglikelihood", "a", "")], disable_tqdm=True
    )
    assert blank[0] == pytest.approx(likelihood([EOS], b" a")[0], rel=1e-5)
    assert nothing == (0.0, True)
    assert model.loglikelihood_rolling([_instance("loglikelihood_rolling", "")], disable_tqdm=True) == [0.0]


def test_tokens_that_join_context_and_continuation_belong_to_the_continuation(variables):
    tokenizer = BpeTokenizer.train([b"abcd abcd abcd"] * 3, 259)
    model = UltramemLM(CONFIG_OF[259], variables_of(CONFIG_OF[259]), tokenizer, max_length=WINDOW)
    whole = tokenizer.encode(b"xabcd").tolist()
    context, continuation = model._encode_pair("xa", "bcd")
    assert context == tokenizer.encode(b"xa").tolist() == [*tokenizer.encode(b"x"), *tokenizer.encode(b"a")]
    assert continuation == whole[2:]
    assert len(whole) < 5
    assert model.tokenizer_name == f"bpe-{tokenizer.fingerprint}"
    assert model.eot_token_id == model.prefix_token_id == tokenizer.eos_id


CONFIG_OF = {
    259: ModelConfig(vocab_size=259, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8)
}


class Starting(ByteTokenizer):
    """A tokenizer that puts a token of its own before texts."""

    start_ids = (3,)


def test_what_the_tokenizer_puts_before_texts_stands_before_every_context(variables, likelihood):
    model = UltramemLM(CONFIG, variables, Starting(), max_length=WINDOW, batch_size=4)
    assert model.tok_encode("é\udcff") == [3, 0xC3, 0xA9, 0xFF]
    requests = [_instance("loglikelihood", "ab", " c"), _instance("loglikelihood", "", "ab")]
    found = [total for total, _ in model.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx([likelihood(b"\3ab", b" c")[0], likelihood(b"\3", b"ab")[0]], rel=1e-5)
    (whole,) = model.loglikelihood_rolling([_instance("loglikelihood_rolling", "ab")], disable_tqdm=True)
    assert whole == pytest.approx(found[1])
    without = UltramemLM(CONFIG, variables, Starting(), max_length=WINDOW, add_start_ids=False)
    assert (without.tok_encode("a"), without.prefix_token_id, without.eot_token_id) == ([97], 3, EOS)


def test_filters_and_groups_are_named_in_the_table():
    results = {
        "results": {"a": {"alias": "a", "sample_len": 3, "em,strict": 0.5, "em_stderr,strict": "N/A"}},
        "groups": {"g": {"alias": "g", "acc,none": 0.25, "acc_stderr,none": 0.1}},
    }
    assert result_rows(results) == [
        {"task": "a", "metric": "em (strict)", "value": 0.5, "stderr": None, "n": 3},
        {"task": "g", "metric": "acc", "value": 0.25, "stderr": 0.1, "n": None},
    ]


def test_the_tasks_of_the_paper_are_tasks_of_the_harness():
    folder = pathlib.Path(lm_eval.__file__).parent / "tasks"
    parts = ("arc", "gpqa/zeroshot", "triviaqa", "mmlu/default", "bbh/cot_fewshot", "super_glue/boolq")
    parts += ("hellaswag", "winogrande", "agieval", "drop")
    manager = TaskManager(include_path=[folder / part for part in parts], include_defaults=False)
    assert set(PAPER_TASKS.values()) <= set(manager.all_tasks)
    assert len(PAPER_TASKS) == 10
    assert expanded(["drop", "paper", "wikitext"]) == ["drop", *list(PAPER_TASKS.values())[:-1], "wikitext"]


@pytest.fixture
def few_tasks(tasks, monkeypatch):
    """The harness without its own tasks, which take seconds to list."""
    monkeypatch.setattr(
        lm_eval_tasks,
        "TaskManager",
        lambda include_path, **_: TaskManager(include_path=include_path, include_defaults=False),
    )
    tasks.write("one_task", [{"a": "b"}], output_type="generate_until", doc_to_text="a", doc_to_target="b")
    return tasks


def test_groups_and_wildcards_stand_for_their_tasks(model, few_tasks):
    for name, count in [("part_a", 2), ("part_b", 6)]:
        few_tasks.write(
            name,
            CHOICES[:count],
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            metric_list=[{"metric": "acc"}],
        )
    group = {
        "group": "both",
        "task": ["part_a", "part_b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (few_tasks.folder / "both.yaml").write_text(yaml.safe_dump(group))
    rows = {row["task"]: row for row in result_rows(evaluate_tasks(model, ["both"], few_tasks.folder))}
    assert list(rows) == ["part_a", "part_b", "both"]
    assert [row["n"] for row in rows.values()] == [2, 6, 8]
    expected = (2 * rows["part_a"]["value"] + 6 * rows["part_b"]["value"]) / 8
    assert rows["both"]["value"] == pytest.approx(expected)
    matched = result_rows(evaluate_tasks(model, ["part_*"], few_tasks.folder))
    assert matched == [rows["part_a"], rows["part_b"]]


def _refused(model, *arguments, **options):
    with pytest.raises(UserError) as error:
        evaluate_tasks(model, *arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_an_unknown_task_is_refused_with_the_nearest_names(model, few_tasks):
    assert (
        _refused(model, ["one_tusk"], few_tasks.folder) == "unknown task 'one_tusk': did you mean 'one_task'?"
    )
    assert "no known name" in _refused(model, ["zzz"], few_tasks.folder)
    assert "at least one task" in _refused(model, [])
    assert "tasks_path = 'nowhere'" in _refused(model, ["one_task"], "nowhere")


def test_a_task_that_cannot_be_loaded_is_named(model, few_tasks):
    (few_tasks.folder / "one_task.jsonl").unlink()
    message = _refused(model, ["one_task"], few_tasks.folder)
    assert message.startswith("task 'one_task': cannot be loaded: FileNotFoundError: ")


BAD = {
    "an empty window": (dict(max_length=0), "max_length = 0"),
    "a negative seed": (dict(seed=-1), "seed = -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_refused(variables, case):
    options, said = BAD[case]
    with pytest.raises(UserError, match=re.escape(said)):
        UltramemLM(CONFIG, variables, ByteTokenizer(), **{"max_length": WINDOW, **options})


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size = 257: must be at most 200"):
        UltramemLM(ModelConfig(vocab_size=200), {}, ByteTokenizer(), max_length=WINDOW)


def test_without_the_harness_one_line_says_how_to_install_it(monkeypatch):
    modules = "ultramem_jax.interop.lm_eval", "ultramem_jax.interop.lm_eval_tasks"
    take_away(monkeypatch, "lm_eval", *modules)
    for module in modules:
        with pytest.raises(UserError, match=re.escape('pip install "ultramem_jax[lm-eval]"')):
            importlib.import_module(module)
