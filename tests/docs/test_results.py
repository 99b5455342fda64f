"""Results cannot rot: README has the numbers of committed CSV files, and reports those of kept studies.

And the docstring of every config of an experiment says by which command, on what machine, in what time and
with what result it was run.
"""

import ast
import functools
import json
import pathlib
import re
import shlex
import shutil
import statistics
from collections.abc import Callable

import pytest

from experiments.bench_step.records import Study as StepStudy
from experiments.configs import compare
from experiments.forgetting.measurements import Study as ForgettingStudy
from tests.support.documents import ROOT, local_links
from tests.support.result_tables import (
    Printed,
    csv_numbers,
    csv_row,
    csv_rows,
    markdown_tables,
    number,
    printed_numbers,
)
from ultramem_jax.cli import command_line
from ultramem_jax.errors import UserError
from ultramem_jax.planning.records import PlanStudy

RESULTS = ROOT / "experiments" / "results"

README = ROOT / "README.md"
SYSTEMS = {"UltraMem": "ultramem", "MoE": "moe", "dense": "dense", "PKM": "pkm"}
"""README's name of a system -> its name in CSV files."""


def compared(label: str, column: str) -> list[float | None]:
    row = csv_row(RESULTS / "compare" / "compare.csv", system=SYSTEMS[label])
    fields = {
        "validation bits per byte": ("validation bits/byte", "± (val.)"),
        "test bits per byte": ("test bits/byte", "± (test)"),
    }
    return [number(row[field]) for field in fields[column]]


def step_ms(label: str, column: str) -> list[float | None]:
    ways = {
        "kernels, float32": "native",
        "XLA, float32": "XLA",
        "dense gradient, float32": "dense",
        "kernels, bfloat16": "native bf16",
        "authors, PyTorch": "authors, PyTorch",
    }
    slots = int(label.replace(",", ""))
    return [number(csv_row(RESULTS / "bench_step" / "bench_step.csv", slots=slots, way=ways[column])["ms"])]


def decoding_seconds(label: str, column: str) -> list[float | None]:
    dtype, batch = column.split(", batch ")
    found = {"study": "batch", "dtype": dtype, "batch": batch, "system": SYSTEMS[label]}
    return [number(csv_row(RESULTS / "bench_decode" / "bench_decode.csv", **found)["median_s"])]


SOURCES: dict[tuple[str, str], Callable[[str, str], list[float | None]]] = {
    ("Equal compute", "system"): compared,
    ("Training step", "slots"): step_ms,
    ("Decoding", "system"): decoding_seconds,
}
"""A table with numbers in README, by its section and the name of its first column -> the measured values of a
cell, from the label of its row and the name of its column; None for what was not measured."""
TABLES = {(table.heading, table.header[0]): table for table in markdown_tables(README)}


def test_every_table_with_numbers_has_a_source():
    assert {name for name, table in TABLES.items() if table.has_numbers()} == SOURCES.keys()
    assert len(TABLES) == len(markdown_tables(README))


@pytest.mark.parametrize("name", SOURCES)
def test_readme_rounds_what_the_csv_files_have(name):
    wrong = []
    for row in TABLES[name].rows:
        for column, cell in zip(TABLES[name].header[1:], row[1:], strict=True):
            if "paper" in column:
                continue
            measured = [value for value in SOURCES[name](row[0], column) if value is not None]
            if not are_rounded(printed_numbers(cell), measured):
                wrong.append(f"{row[0]}, {column}: {cell!r}, measured {measured}")
    assert not wrong


def are_rounded(printed: list[Printed], measured: list[float]) -> bool:
    return len(printed) == len(measured) and all(p.rounds(m) for p, m in zip(printed, measured, strict=True))


def lost(system: str, method: str) -> float:
    """Returns how many per cent of the facts known before a method loses."""
    runs = ForgettingStudy.load(RESULTS / "forgetting" / "forgetting.json").runs
    shares = [run.lost for run in runs if (run.system, run.method) == (system, method)]
    return 100 * statistics.fmean(shares)


def test_the_guide_says_what_methods_forget():
    tables = markdown_tables(ROOT / "docs" / "guides" / "learn_without_forgetting.md")
    (table,) = (table for table in tables if table.header[0] == "method")
    study = ForgettingStudy.load(RESULTS / "forgetting" / "forgetting.json")
    assert len(table.header) == 1 + len({run.system for run in study.runs})
    assert len(table.rows) == len({run.method for run in study.runs})
    methods = {"all rows that are read": "full memory"}

    def measured(system: str, method: str) -> str:
        runs = [run for run in study.runs if (run.system, run.method) == (system, method)]
        learned, rise = (
            statistics.fmean(of) for of in ([r.end.learned for r in runs], [r.risen for r in runs])
        )
        # The report ranks methods that learn nearly as much as was wanted.
        if learned < 0.95 * runs[0].enough:
            return f"learns {100 * learned:.0f} %"
        return f"{100 * statistics.fmean(run.lost for run in runs):.0f} %, {rise:.3f}"

    systems = {run.system.partition("-")[0]: run.system for run in study.runs}
    for method, *cells in table.rows:
        for name, cell in zip(table.header[1:], cells, strict=True):
            assert cell == measured(systems[name], methods.get(method, method)), (method, name)


def moe_over_ultramem(dtype: str, batch: int) -> float:
    moe, ultramem = (decoding_seconds(s, f"{dtype}, batch {batch}")[0] for s in ("MoE", "UltraMem"))
    return moe / ultramem


def ultramem_over_dense_with_kernels(dtype: str) -> float:
    path, found = RESULTS / "bench_decode_kernels" / "bench_decode.csv", {"dtype": dtype, "batch": 64}
    ultramem, dense = (number(csv_row(path, system=s, **found)["median_s"]) for s in ("ultramem", "dense"))
    return ultramem / dense


def largest(path: str, field: str) -> float:
    return max(value for row in csv_rows(RESULTS / path) if (value := number(row[field])) is not None)


def highest_gb(run: str) -> float:
    return largest(f"{run}/memory.csv", "peak_bytes") / 1e9


def compared_bytes() -> float:
    config = compare.get_config()
    return config.train.steps * config.train.batch_size * config.data.seq_len


SENTENCES: dict[str, Callable[[], list[float]]] = {
    r"\*\*([\d.]+) times\*\* as long": lambda: [moe_over_ultramem("float32", 16)],
    r"The ([\d.]+) in bfloat16 at batch 16 is uncertain": lambda: [moe_over_ultramem("bfloat16", 16)],
    r"equal FLOPs per token, ([\d.]+ M) bytes of the standard library": lambda: [compared_bytes()],
    r"At batch 64 MoE takes ([\d.]+) and ([\d.]+) times as long as UltraMem": (
        lambda: [moe_over_ultramem(dtype, 64) for dtype in ("float32", "bfloat16")]
    ),
    r"New facts cost UltraMem (\d+) % of the old ones by sparse memory fine-tuning, (\d+) % by full "
    r"fine-tuning and (\d+) % by LoRA": (
        lambda: [lost("UltraMem", by) for by in ("sparse memory, SGD", "full fine-tuning", "LoRA")]
    ),
    r"trains on two CPU cores, in ([\d.]+) GB": lambda: [highest_gb("slots_100m")],
    r"trains in ([\d.]+) GB": lambda: [highest_gb("slots_20m")],
    r"([\d.]+) and ([\d.]+) times as long as dense": lambda: [
        ultramem_over_dense_with_kernels(dtype) for dtype in ("float32", "bfloat16")
    ],
    r"cost up to ([\d.]+) bits per byte": lambda: [largest("row_states/row_states.csv", "Δ")],
}
"""Words of README with numbers that are measured or derived -> their values."""
UNMEASURED = {
    r"\b\d{4}\.\d{5}\b": "a paper on arXiv",
    r"Apache 2\.0": "a licence",
    r"about 2\.1 bits per byte": "of the demo, whose run is not committed",
}
"""Words of README with decimal numbers that no committed file has -> what they are."""


@pytest.mark.parametrize("pattern", SENTENCES)
def test_sentences_of_readme_round_what_the_csv_files_have(pattern):
    (match,) = re.finditer(pattern, " ".join(README.read_text(encoding="utf-8").split()))
    assert are_rounded(printed_numbers(" ".join(match.groups())), SENTENCES[pattern]())


def test_models_of_two_billion_parameters_have_as_many():
    assert README.read_text(encoding="utf-8").count("two billion parameters") == 2
    rows = csv_rows(RESULTS / "bench_decode" / "bench_decode.csv")
    sparse = {int(row["parameters"]) for row in rows if row["study"] == "batch" and row["system"] != "dense"}
    assert sparse and all(round(parameters / 1e9) == 2 for parameters in sparse)


def test_every_other_decimal_number_of_readme_is_known():
    text = re.sub(
        r"^```.*?^```|^\|.*?$", "", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    text = " ".join(re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text).split())
    for pattern in [*SENTENCES, *UNMEASURED]:
        assert re.search(pattern, text), pattern
        text = re.sub(pattern, "", text)
    assert not re.findall(r"\d+\.\d+", text)


REPORTS = [table for table in sorted(RESULTS.rglob("*.csv")) if table.with_suffix(".md").exists()]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_main_table_of_a_report_rounds_its_csv_file(path):
    rows = csv_rows(path)
    tables = [t for t in markdown_tables(path.with_suffix(".md")) if list(t.header) == list(rows[0])]
    if not tables:  # no table of this shape, and all others are made again from what is kept as JSON
        assert path.with_suffix(".json").exists()
        return
    assert len(tables[0].rows) == len(rows)
    wrong = []
    for row, cells in zip(rows, tables[0].rows, strict=True):
        for column, cell in zip(row, cells, strict=True):
            measured = number(row[column])
            fits = (
                are_rounded(printed_numbers(cell), [measured])
                if measured is not None
                else cell.split() == row[column].split()
            )
            if not fits:
                wrong.append(f"{cells[0]}, {column}: {cell!r}, measured {row[column]!r}")
    assert not wrong


REDRAWN = {
    "audit": ("audit", "--redraw", "--out={folder}"),
    "audit_depth": ("audit", "--redraw", "--budget=experiments/configs/depth.json", "--out={folder}"),
    "bench_decode": ("bench_decode", "--redraw", "--results={folder}"),
    "bench_decode_kernels": ("bench_decode", "--redraw", "--results={folder}"),
    "bench_step": ("bench_step", "--redraw", "--results={folder}"),
    "open_models": ("open_models", "--redraw", "--out={folder}"),
    "forgetting": ("forgetting", "--redraw", "--results={folder}"),
    "plan": ("plan", "--redraw", "--out={folder}/slots_1b.md"),
    "recall": ("recall", "--redraw", "--results={folder}"),
}
"""A folder with studies that are kept as JSON -> the command that makes its reports again."""


def test_there_is_a_command_for_every_kept_study():
    assert {path.parent.name for path in RESULTS.rglob("*.json")} == REDRAWN.keys()


@pytest.mark.parametrize("name", REDRAWN)
def test_reports_are_those_of_the_kept_numbers(run, name, tmp_path):
    committed = RESULTS / name
    for study in committed.glob("*.json"):
        shutil.copy(study, tmp_path)
    status, _, err = run(*(word.format(folder=tmp_path) for word in REDRAWN[name]))
    assert status == 0, err
    # The text of programs (.gz) is not committed.
    kept = [path for path in committed.iterdir() if path.suffix != ".gz"]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept}
    # Of figures only that they are there: fonts differ between machines.
    texts = [path for path in kept if path.suffix != ".png"]
    old = [path.name for path in texts if path.read_bytes() != (tmp_path / path.name).read_bytes()]
    again = " ".join(REDRAWN[name]).format(folder=committed.relative_to(ROOT))
    assert not old, f"python launch.py {again}"


def test_what_is_kept_is_read_as_it_was_saved(tmp_path):
    for cls, study in {StepStudy: "bench_step/bench_step", PlanStudy: "plan/slots_1b"}.items():
        read = cls.load(RESULTS / f"{study}.json")
        read.save(tmp_path / "again.json")
        assert cls.load(tmp_path / "again.json") == read


@pytest.mark.parametrize("cls", [StepStudy, PlanStudy])
def test_another_file_is_no_study(cls, tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        cls.load(tmp_path / "none.json")
    for text in ("", "[]", "{}", json.dumps({"memory": {}, "plans": {}})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match=r"other\.json: not a"):
            cls.load(tmp_path / "other.json")


@pytest.mark.parametrize("figure", sorted(RESULTS.rglob("*.png")), ids=lambda path: path.name)
def test_every_figure_is_shown_by_its_report(figure):
    reports = list(figure.parent.glob("*.md"))
    assert any(figure.name in local_links(report) for report in reports)
    assert figure.read_bytes().startswith(b"\x89PNG")


CONFIGS = [
    *(path for path in (ROOT / "experiments" / "configs").glob("*.py") if path.stem != "__init__"),
    ROOT / "ultramem_jax" / "recipes" / "demo.py",
]


def said(config: pathlib.Path) -> dict[str, str]:
    """Returns what a config's docstring says after each name and colon, indented lines included."""
    text = ast.get_docstring(ast.parse(config.read_text(encoding="utf-8")))
    found = re.findall(r"^([A-Z]\w+): (.+(?:\n    .+)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_how_it_was_run(config):
    assert list(said(config)) == ["Command", "Machine", "Time", "Result"]
    if said(config)["Result"] == "not run.":
        return
    path, _, words = said(config)["Result"].partition(": ")
    report = ROOT / path
    numbers = [n.value for n in printed_numbers(report.read_text(encoding="utf-8"))]
    for table in report.parent.glob("*.csv"):
        numbers += csv_numbers(table)
    missing = [n.text for n in printed_numbers(words) if not any(map(n.rounds, numbers))]
    assert not missing and printed_numbers(words)


def bits_and_spread(path: str, **wanted: object) -> list[float | None]:
    row = csv_row(RESULTS / path, **wanted)
    return [number(row["validation bits/byte"]), number(row["± (val.)"])]


def ladder_ends() -> list[float | None]:
    first, *_, last = csv_rows(RESULTS / "ablate" / "ladder.csv")
    return [number(row[name]) for row in (first, last) for name in ("validation bits/byte", "± (val.)")]


def smallest_row_states() -> list[float | None]:
    rows = csv_rows(RESULTS / "row_states" / "row_states.csv")
    (row,) = [row for row in rows if number(row["bytes/slot"]) == 260 and row["rounding"] == "stochastic"]
    return [number(row["bytes/slot"]), number(rows[0]["bytes/slot"]), number(row["Δ"]), number(row["± (Δ)"])]


PLUS_MINUS = r"([\d.]+ ± [\d.]+)"
LABELLED: dict[tuple[str, str], Callable[[], list[float | None]]] = {
    ("ablate", rf"from {PLUS_MINUS} to {PLUS_MINUS}"): ladder_ends,
    ("row_states", rf"(\d+) bytes a slot instead of (\d+), .* by {PLUS_MINUS}"): smallest_row_states,
    ("slots_20m", r"at most ([\d.]+) GB"): lambda: [highest_gb("slots_20m")],
    ("slots_100m", r"at most ([\d.]+) GB"): lambda: [highest_gb("slots_100m")],
    **{
        ("compare", rf"{PLUS_MINUS}(?: validation bits per byte)? for {label}\b"): functools.partial(
            bits_and_spread, "compare/compare.csv", system=system
        )
        for label, system in SYSTEMS.items()
    },
}
"""A config, and words of its result with the label of a row of a CSV file -> the values of that row."""


@pytest.mark.parametrize(("config", "pattern"), LABELLED)
def test_results_of_configs_are_those_of_their_rows(config, pattern):
    (match,) = re.finditer(pattern, said(ROOT / "experiments" / "configs" / f"{config}.py")["Result"])
    assert are_rounded(printed_numbers(" ".join(match.groups())), LABELLED[config, pattern]())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_a_command_that_can_be_given(run, config, monkeypatch):
    words = shlex.split(said(config)["Command"])
    parsed = []

    def parse_alone(main, argv, usage, base, *rest):
        return original(lambda: parsed.append(command_line.run_config()), argv, usage, base, *rest)

    original = command_line.run
    monkeypatch.setattr(command_line, "run", parse_alone)
    monkeypatch.chdir(ROOT)
    (program,) = (p for p in (["python", "launch.py"], ["ultramem"]) if words[: len(p)] == p)
    status, _, err = run(*words[len(program) :])
    assert status == 0 and len(parsed) == 1, err
