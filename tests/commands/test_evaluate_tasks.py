"""`launch.py evaluate --tasks`: a table of what the library finds, or one line that says what is wrong."""

import json

import pytest
import yaml

from tests.support.absent import take_away
from tests.support.small_run import train_tiny
from ultramem_jax.reporting import markdown
from ultramem_jax.training.restore import load_model

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    return train_tiny(folder, folder / "run", num_keys=8, steps=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the task `slots`, of three documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "slots.jsonl"
    answers = [("read a", 0), ("a slot", 1), ("", 1)]
    data.write_text("".join(json.dumps({"text": text, "answer": i}) + "\n" for text, i in answers))
    task = {
        "task": "slots",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["slot", "é"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "slots.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_the_table_has_what_the_library_finds(run, workdir, tasks):
    from ultramem_jax.interop.lm_eval import UltramemLM
    from ultramem_jax.interop.lm_eval_tasks import evaluate_tasks, result_rows

    loaded = load_model(workdir)
    model = UltramemLM(loaded.config.model, loaded.variables, loaded.tokenizer, max_length=16, batch_size=4)
    flags = [f"--workdir={workdir}", "--tasks=slots", f"--tasks_path={tasks}", "--batch_size=4"]
    status, out, err = run("evaluate", *flags, "--limit=2", "--num_fewshot=1")
    assert status == 0, err
    rows = result_rows(evaluate_tasks(model, ["slots"], tasks, limit=2, num_fewshot=1))
    assert out == f"step 2 of {workdir}\n{markdown.table(rows)}\n"
    assert [(row["task"], row["metric"], row["n"]) for row in rows] == [
        ("slots", "acc", 2),
        ("slots", "acc_norm", 2),
    ]


BAD = {
    "no task": (["--tasks="], "tasks = []", "at least one"),
    "no such folder": (["--tasks=slots", "--tasks_path=nowhere"], "tasks_path = 'nowhere'", "folder"),
    "a flag of splits": (["--tasks=slots", "--stride=4"], "--stride = 4", "--tasks"),
    "a flag of tasks": (["--limit=4"], "--limit = 4", "needs --tasks"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_gets_one_line_that_says_what_is_allowed(run, workdir, case):
    flags, *said = BAD[case]
    status, _, err = run("evaluate", f"--workdir={workdir}", *flags)
    assert status == 2
    (message,) = err.splitlines()
    assert message.startswith("error: ") and all(words in message for words in said), message


def test_without_the_harness_one_line_says_how_to_install_it(run, monkeypatch):
    take_away(monkeypatch, "lm_eval", "ultramem_jax.interop.lm_eval", "ultramem_jax.interop.lm_eval_tasks")
    status, out, err = run("evaluate", "--workdir=nowhere", "--tasks=slots")
    assert (status, out) == (2, "")
    assert err == 'error: needs lm-evaluation-harness: pip install "ultramem_jax[lm-eval]"\n'
