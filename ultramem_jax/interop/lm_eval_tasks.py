"""Evaluates models on tasks of lm-evaluation-harness: those that it knows, and local ones."""

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ultramem_jax.errors import UserError, one_line, require
from ultramem_jax.interop.lm_eval import UltramemLM
from ultramem_jax.interop.paper_tasks import expanded

# isort: split
# After our own module, which says how to install the package if it is missing.
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def evaluate_tasks(
    model: UltramemLM,
    tasks: Sequence[str],
    tasks_path: str | Path = "",
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on tasks of lm-evaluation-harness, and returns what its `simple_evaluate` returns.

    Tasks of the harness download their data. Those in a folder of one's own, with `dataset_path: json` and
    `data_files`, need no network.

    Args:
        model: the model.
        tasks: names of tasks, groups and tags, which may have wildcards; `paper` stands for `PAPER_TASKS`.
        tasks_path: folder with further tasks, as YAML files. They go before those of the harness.
        limit: number of examples per task, or a share of them below 1; None takes all.
        num_fewshot: number of examples in a prompt; None takes the task's own.
        **options: further arguments of `simple_evaluate`. Standard errors that need it are of 1,000 bootstrap
            samples, unless `bootstrap_iters` says another number.

    Raises:
        UserError: no task, one that is not known or cannot be loaded, or no such folder.
    """
    names = expanded(tasks)
    require(bool(names), "tasks", list(tasks), "must name at least one task")
    folder = str(tasks_path)
    require(not folder or Path(folder).is_dir(), "tasks_path", folder, "must be a folder with tasks in YAML")
    with _calm():
        manager = _task_manager(names, folder)
        given = {
            "tasks": [task for name in names for task in _loaded(manager, name)],
            "task_manager": manager,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "bootstrap_iters": 1000,
            "log_samples": False,
        }
        results: dict[str, Any] = simple_evaluate(model, **given | options)
    return results


def _task_manager(names: list[str], folder: str) -> TaskManager:
    """Returns a manager that knows all names.

    To list the harness's own tasks takes seconds, so they are left out if all names are tasks in the folder.
    """
    if folder:
        with _described(f"tasks_path = {folder!r}"):
            manager = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=folder or None)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "no known name is like it"
            raise UserError(f"unknown task {name!r}: {hint}")
    return manager


def _loaded(manager: TaskManager, name: str) -> Iterator[Any]:
    """Yields the tasks and groups that a name stands for, with their data."""
    for matched in manager.match_tasks([name]):
        with _described(f"task {matched!r}"):
            found = manager.load([matched])
        group = found.get("groups", {}).get(matched)
        yield from found["tasks"].values() if group is None else (group,)


@contextlib.contextmanager
def _described(what: str) -> Iterator[None]:
    """Makes any error of the harness, which reads files and data of the user's, one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keeps the harness's progress reports off standard output, and its bootstrap in this process.

    Its pool of processes would be forked from one in which JAX has threads, which may deadlock.
    """
    logger = logging.getLogger("lm_eval")
    level, pool = logger.level, os.environ.get("DISABLE_MULTIPROC")
    if level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if pool is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = pool


def result_rows(results: dict[str, Any]) -> list[dict[str, object]]:
    """Returns a row per metric, with the columns `task`, `metric`, `value`, `stderr` and `n`, of documents.

    A filter of answers other than the harness's default stands behind the metric. An unknown standard error
    is None.

    Args:
        results: the result of `evaluate_tasks`.
    """
    rows: list[dict[str, object]] = []
    for name, found in (results["results"] | results.get("groups", {})).items():
        for key, value in found.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{answers}")
            rows.append(
                {
                    "task": name,
                    "metric": metric if answers == "none" else f"{metric} ({answers})",
                    "value": value,
                    "stderr": None if isinstance(error, str) else error,
                    "n": found.get("sample_len"),
                }
            )
    return rows
