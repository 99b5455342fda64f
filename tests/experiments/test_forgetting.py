"""Tasks of the experiment: what a method may change, what is not repeated, and what the report says."""

import csv
import dataclasses
import itertools
import json
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest

from experiments.common.rates import at_an_end
from experiments.forgetting import study as study_module
from experiments.forgetting import systems, tables
from experiments.forgetting.evaluation import Sizes
from experiments.forgetting.fine_tuning import BaseModel, Task, fine_tune, packed, run_config
from experiments.forgetting.measurements import Study
from experiments.forgetting.methods import METHODS, VARIANTS
from experiments.forgetting.mixture import write_mixture
from experiments.forgetting.records import FineTuning, Point, Setup, Speed, TaskSequence
from experiments.forgetting.study import SystemRuns, best_rate
from experiments.forgetting.systems import Setting
from tests.support.drawn import variables_of
from ultramem_jax.config import DataConfig, ModelConfig, RunConfig
from ultramem_jax.data import ByteTokenizer, builder
from ultramem_jax.data.facts import Population, biography, queries
from ultramem_jax.errors import UserError
from ultramem_jax.presets import families
from ultramem_jax.training.background import BackgroundReads, save_background
from ultramem_jax.training.trainable import names

MODEL = ModelConfig(
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=16,
    memories={
        "memory": families.memory_plus(placement="1:1", num_keys=16, top_m=4, num_heads=2, value_dim=16)
    },
)
TASK = Task(
    ("One two.", "Three."),
    steps=4,
    batch_size=2,
    seq_len=32,
    check_every=1,
    measure_every=2,
    enough=0.9,
    slots=5,
)
SETTING = Setting(
    before=Population(0, 1),
    steps_before=3,
    new=1,
    new_in_sequence=1,
    copies=1,
    mixture_bytes=1000,
    mixture_share=0.5,
    task=TASK,
    rates={method.name: (1e-2,) for method in METHODS},
    sizes=Sizes(batches=1, batch_size=2, seq_len=128),
    background_batches=1,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "background.npz"
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, 256).astype(np.int32)
    save_background(path, {"memory_tables": BackgroundReads(counts, counts, 8)}, {})
    variables = jax.tree.map(np.asarray, variables_of(MODEL))
    return BaseModel("small", MODEL, variables, ByteTokenizer(), str(path))


def point(step=0, **known):
    plain = dict(
        learned=0.0,
        learned_held_out=0.0,
        learned_nats=3.0,
        kept=1.0,
        kept_nats=1.0,
        bits_per_byte=2.0,
    )
    return Point(step=step, **plain | known)


class Known(NamedTuple):
    """An evaluation in which a model learns so much in every step."""

    a_step: float
    steps: list

    def learned(self, variables):
        self.steps.append(len(self.steps) + 1)
        return self.a_step * len(self.steps)

    def point(self, step, variables):
        return point(step, learned=self.a_step * step)


def changed(model, variables):
    """Returns the names of the leaves that a task has changed."""
    found = set()
    for name, before, after in zip(
        names(variables), jax.tree.leaves(model.variables), jax.tree.leaves(variables), strict=True
    ):
        if not np.array_equal(before, after) and not name.startswith("buffers"):
            found.add(name)
    return found


@pytest.mark.parametrize("method", [*METHODS, VARIANTS[2], VARIANTS[4]], ids=lambda method: method.name)
def test_a_method_changes_what_it_says(model, method):
    task = replace(TASK, texts=[biography(of, 0) for of in Population(0, 2).people()])
    rate = 1.0 if method.settings.get("row_optimizer") == "sgd" else 1e-2
    record, variables = fine_tune(model, method, rate, task, Known(0.0, []), seed=1)
    assert [one.step for one in record.points] == [0, 2, 4]
    assert record.method == method.name and record.rate == rate
    values, most = "memory/memory_tables/values", round(5 * method.share)
    moved = changed(model, variables)
    if method.name == "full fine-tuning":
        assert {values, "params/embedding", "params/layer_1/attention/w_query"} < moved
    elif method.name == "LoRA":
        attention = {f"attention/w_{name}" for name in ("key", "out", "query", "value")}
        matrices = attention | {"feed_forward/w_in", "feed_forward/w_out"}
        assert moved == {f"params/layer_1/{name}" for name in matrices}
    else:
        assert moved == {values}
        table = variables["memory"]["memory_tables"]["values"]
        rows = (table != model.variables["memory"]["memory_tables"]["values"]).any(1).sum()
        assert 0 < rows <= (4 * most if method.selects else 256)
    config = run_config(model, method, 0.5, task, seed=1)
    assert config.train.learning_rate == 0.5 and config.train.weight_decay == 0.0
    assert config.train.slots_per_step == (most if method.selects else 0) == record.slots


def test_a_task_ends_when_enough_is_learned(model):
    task, evaluation = replace(TASK, steps=8, check_every=1, measure_every=2), Known(0.31, [])
    record, _ = fine_tune(model, METHODS[2], 1e-3, task, evaluation, seed=0)
    assert evaluation.steps == [1, 2, 3] and [point.step for point in record.points] == [0, 2, 3]
    assert record.is_enough and record.end.learned == 0.9 and record.at(2.0) is None


def test_methods_are_compared_where_equally_much_is_learned():
    points = [point(), point(100, learned=0.5, kept=0.8, bits_per_byte=2.1)]
    points.append(point(150, learned=0.9, kept=0.6, bits_per_byte=2.5))
    run = FineTuning("s", "m", 0.1, 0, 0, 0.7, points, False, 1.0)
    between = point(125, learned=0.7, kept=0.7, bits_per_byte=2.3)  # half of the way
    assert {name: pytest.approx(value) for name, value in vars(run.end).items()} == vars(between)
    assert run.is_enough and (run.lost, run.risen) == (pytest.approx(0.3), pytest.approx(0.3))
    assert run.at(0.0) == points[0] and run.at(0.95) is None
    few = replace(run, points=points[:2])
    assert few.end == points[1] and not few.is_enough and few.lost == pytest.approx(0.2)
    assert not replace(run, diverged=True).is_enough


def test_a_task_that_diverges_ends_with_the_measurement_before(model):
    task = replace(TASK, steps=8, check_every=2, measure_every=2)
    record, _ = fine_tune(model, METHODS[4], 1e30, task, Known(0.0, []), seed=0)
    assert record.diverged and not record.is_enough
    assert [point.step for point in record.points] in ([0], [0, 2])


def test_texts_are_packed_one_after_the_other():
    task = replace(TASK, texts=["ab", "c", "def"], batch_size=2, seq_len=5)
    batches = list(itertools.islice(packed(task, ByteTokenizer(), seed=0), 5))
    assert all(batch.shape == (2, 6) and batch.dtype == np.int32 for batch in batches)
    stream = np.concatenate([batch.reshape(-1) for batch in batches])
    words = "".join(chr(token) if token < 256 else "|" for token in stream).split("|")
    for start in range(0, 15, 3):  # every round has each text once
        assert sorted(words[start : start + 3]) == ["ab", "c", "def"]
    assert words[:3] != words[3:6] or words[3:6] != words[6:9]


def test_the_best_rate_forgets_least_of_those_that_learn_enough():
    def run(rate, diverged=False, **known):
        return FineTuning("s", "m", rate, 0, 0, 0.9, [point(), point(9, **known)], diverged, 1.0)

    runs = [
        run(0.1, learned=0.5, kept=1.0),
        run(0.2, learned=0.95, kept=0.6),
        run(0.3, learned=0.91, kept=0.8, bits_per_byte=2.5),
        run(0.4, learned=0.99, kept=0.8, bits_per_byte=2.4),
        run(0.5, True, learned=0.99, kept=1.0),
    ]
    assert best_rate(runs) == 0.4 and not at_an_end(0.4, (run.rate for run in runs))
    assert best_rate(runs[:1] + runs[4:]) == 0.1
    assert best_rate([run(0.1, learned=0.2, kept=0.9), run(0.2, learned=0.3, kept=0.1)]) == 0.2
    # Where none learns enough, a little more is not worth much that is forgotten.
    nearly = [run(0.1, learned=0.57, kept=0.4), run(0.2, learned=0.6, kept=0.1)]
    assert best_rate(nearly) == 0.1 and at_an_end(0.1, (run.rate for run in nearly))
    with pytest.raises(UserError, match=r"rates of m = '0.5': must have one that is low enough"):
        best_rate(runs[4:])


def test_runs_that_have_ended_are_not_repeated(model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a slot is read\n" * 2000)
    monkeypatch.setattr(builder, "cache_folder", lambda: tmp_path / "cache")
    text = DataConfig("text", str(tmp_path / "text.txt"))
    method = METHODS[0]
    system = SystemRuns(model, SETTING, text, tmp_path / "runs")
    taught = system.compare(method, seeds=2)
    sequence = system.in_sequence(method, tasks=2, seed=0)
    assert [len(left) for left in sequence.left] == [1, 2] and len(sequence.kept) == 2
    assert [run.seed for run in taught] == [0, 1] and {run.rate for run in taught} == {1e-2}
    first = taught[0].points[0]
    assert 0 <= first.kept <= 1 and first.bits_per_byte > 1

    monkeypatch.setattr(study_module, "fine_tune", None)  # what is called again fails
    again = SystemRuns(model, SETTING, text, tmp_path / "runs")
    assert again.compare(method, seeds=2) == taught and again.in_sequence(method, 2, 0) == sequence
    with pytest.raises(TypeError):
        again.compare(method, seeds=3)
    # Nor is what is known from elsewhere.
    (tuning,) = system.tune(method)
    known = Study([], [], [], [tuning], taught[1:], taught[:1], [sequence])
    other = SystemRuns(model, SETTING, text, tmp_path / "other", known)
    assert other.compare(method, seeds=2) == taught and other.in_sequence(method, 2, 0) == sequence
    ended = replace(sequence, tasks=3, left=sequence.left[:1])  # diverged in its second task
    diverged = SystemRuns(model, SETTING, text, tmp_path / "other", replace(known, sequences=[ended]))
    assert diverged.in_sequence(method, 3, 0) == ended
    for unknown in (lambda: other.in_sequence(method, 3, 0), lambda: other.tune(METHODS[1])):
        with pytest.raises(TypeError):
            unknown()
    known = replace(known, tunings=[replace(tuning, rate=2e-2)])
    with pytest.raises(TypeError):
        SystemRuns(model, SETTING, text, tmp_path / "other", known).tune(method)
    # A record that something else has decided is refused, and names what it was.
    changes = {
        "run": replace(SETTING, task=replace(TASK, slots=6)),
        "checks": replace(SETTING, task=replace(TASK, measure_every=1)),
        "people before": replace(SETTING, before=Population(5, 6)),
    }
    for name, setting in changes.items():
        with pytest.raises(UserError, match=f"was made with another {name}; give another --workdir"):
            SystemRuns(model, setting, text, tmp_path / "runs").tune(method)
    counts = BackgroundReads(*2 * [np.ones(256, np.int32)], 8)
    save_background(tmp_path / "background.npz", {"memory_tables": counts}, {})
    other = replace(model, background=str(tmp_path / "background.npz"))
    with pytest.raises(UserError, match="was made with another background; give"):
        SystemRuns(other, SETTING, text, tmp_path / "runs").tune(method)
    (record,) = (tmp_path / "runs" / "tuning").rglob("*.json")
    record.write_text(record.read_text().replace('"diverged"', '"ended"'))
    with pytest.raises(UserError, match="not a record of forgetting, TypeError"):
        again.tune(method)


def some_study():
    def run(system, method, seed, **known):
        points = [point(kept=0.8), point(10, **known | dict(learned=0.5)), point(20, **known)]
        return FineTuning(system, method, 1e-3, 64, seed, 0.7, points, False, 2.0)

    sparse, full = METHODS[0].name, METHODS[4].name
    runs = [
        run("A", sparse, 0, learned=0.9, kept=0.8, bits_per_byte=2.0),
        run("A", sparse, 1, learned=1.0, kept=0.56, bits_per_byte=2.2),
        run("A", full, 0, learned=1.0, kept=0.2, bits_per_byte=3.0),
        run("A", full, 1, learned=1.0, kept=0.0, bits_per_byte=3.0),
    ]
    sequence = TaskSequence("A", sparse, 1e-3, 0, 2, [[1.0], [0.5, 0.75]], [0.8, 0.4], [2.0, 2.5])
    nothing = TaskSequence("A", full, 1e-3, 0, 2, [], [], [])  # diverged in its first task
    setup = Setup("A", "Small.", {"setting": {"enough": 0.7}, "runs": []}, "0123", 2.5, 2.4)
    speeds = [Speed(65536, "all rows", 10.0, 1.0, 5_000_000), Speed(65536, "kl", 11.0, 1.1, None)]
    variants = [replace(runs[0], method=VARIANTS[3].name)]
    few = [replace(run("A", "LoRA", 0, learned=0.4, kept=0.1), diverged=True)]
    sequences = [sequence, nothing]
    study = Study([], [setup], speeds, runs[:1], runs + few, variants, sequences)
    return study.measured_in({"devices": "2 × cpu (cpu)", "cpu": "one"})


def test_the_report_says_what_was_measured(tmp_path):
    study = some_study()
    paths = tables.write(study, tmp_path)
    assert sorted(path.name for path in paths) == [
        "forgetting.csv",
        "forgetting.json",
        "forgetting.md",
        "forgetting.png",
        "forgetting_sequence.png",
    ]
    text = paths[0].read_text()
    # Lost: (1 - 0.8/0.8, 1 - 0.56/0.8) and (1 - 0.2/0.8, 1).
    assert "15 ± 21 %" in text and "88 ± 18 %" in text
    said = "loses 15 ± 21 % of the facts known before, and the loss rises by 0.100 ± 0.141; full fine-tuning"
    assert f"- A: {METHODS[0].name} {said}" in text and "too little is learned by LoRA (40 %)" in text
    assert "- A: Small. Its memory" in text and "2.500 to 2.400" in text and "`0123`" in text
    row = next(line for line in text.splitlines() if line.startswith("|") and "88 ±" in line)
    assert [cell.strip() for cell in row.split("|")[6:9]] == ["2 of 2", "", "70 ± 0 %"]
    assert "80 %" in row and "1.000 ± 0.000" in row
    assert "## Rows and scores" in text and "| KL divergence " in text
    assert "by 71 % with LoRA" in text and "| kl " in text
    last = next(line for line in text.splitlines() if "62 %" in line)
    assert "50 %" in last and "75 %" in last and "40 %" in last and "2.500" in last
    with (tmp_path / "forgetting.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and rows[2]["learned"] == "0.9" and rows[2]["step"] == "20"
    assert Study.load(tmp_path / "forgetting.json") == study


def test_a_later_study_keeps_other_systems(tmp_path):
    study = some_study()
    elsewhere = {"devices": "2 × cpu (cpu)", "cpu": "another"}
    later = Study([], [], [], [], [replace(study.runs[0], system="B")], [], []).measured_in(elsewhere)
    together = later.with_parts_of(study)
    assert [run.system for run in together.runs] == ["A"] * 5 + ["B"]
    assert together.speeds == study.speeds and together.sequences == study.sequences
    again = replace(study, speeds=[]).with_parts_of(study)
    assert dataclasses.asdict(again) == dataclasses.asdict(study)
    (setup,) = study.setups
    both = Study([], [setup, replace(setup, system="B")], [], [], [study.runs[0], together.runs[-1]], [], [])
    assert both.of(replace(setup, with_memory=2.41)).runs == study.runs[:1]
    assert both.of(replace(setup, settings={"setting": {"enough": 0.8}, "runs": []})).runs == []
    # Learning rates of methods that the later study did not need stay.
    tuning = replace(study.tunings[0], method="another", rate=1e-2)
    together = replace(study, tunings=[tuning]).with_parts_of(study)
    assert together.tunings == [*study.tunings, tuning]
    # What was measured of a system that was prepared in another way is not that of the system now.
    other = replace(study, setups=[replace(setup, sha256="4567")], runs=[], sequences=[])
    together = other.with_parts_of(study)
    assert together.setups == other.setups and together.runs == together.sequences == []
    assert together.variants == study.variants


def test_a_later_study_keeps_other_seeds():
    study = some_study()
    sparse = [run for run in study.runs if run.method == METHODS[0].name]
    (whole, diverged), nothing = study.sequences, replace(study, runs=[], variants=[], sequences=[])
    again = replace(sparse[0], seconds=3.0)
    together = replace(nothing, runs=[again], sequences=[replace(whole, seed=1)]).with_parts_of(study)
    assert [run for run in together.runs if run.method == again.method] == [sparse[1], again]
    assert together.sequences == [whole, diverged, replace(whole, seed=1)]
    # Another rate or number of tasks replaces what the method had.
    other, more = replace(again, rate=1e-2), replace(whole, seed=1, tasks=3)
    together = replace(nothing, runs=[other], sequences=[more]).with_parts_of(study)
    assert [run for run in together.runs if run.method == other.method] == [other]
    assert together.sequences == [diverged, more]


def test_every_part_says_where_it_was_measured():
    study, elsewhere = some_study(), {"devices": "2 × cpu (cpu)", "cpu": "another"}
    assert list(study.parts()) == [
        "speed",
        "A, learning rates",
        "A, comparison",
        "A, variants",
        "A, sequence",
    ]
    tuning = replace(study.tunings[0], rate=1e-2)
    # One of two tunings is taken over, all runs are, and the sequences are measured again.
    sequences = [replace(sequence, kept=[0.1]) for sequence in study.sequences]
    later = replace(study, speeds=[], tunings=[study.tunings[0], tuning], variants=[], sequences=sequences)
    then, now = later.measured_in(elsewhere).with_parts_of(study).environments
    assert then.strings["cpu"] == "one" and now.strings["cpu"] == "another"
    assert then.parts == ["speed", "A, learning rates", "A, comparison", "A, variants"]
    assert now.parts == ["A, learning rates", "A, sequence"]
    report = tables.report(later.measured_in(elsewhere).with_parts_of(study))
    where = report.partition("## Where this was measured\n\n")[2]
    assert where.startswith("speed; A, learning rates; A, comparison; A, variants:\n\n- cpu: `one`\n\nA, lea")
    assert "sequence:\n\n- cpu: `another`\n\nAll of it:\n\n- devices: `2 × cpu (cpu)`\n\nRuns" in where
    assert "\n\n- devices: `2 × cpu (cpu)`\n- cpu: `one`\n\nRuns" in tables.report(study)


def test_what_decides_a_system_is_kept_without_its_paths():
    config = RunConfig(ModelConfig(), DataConfig("text", "/a/text", tokenizer="/a/model.gguf"))
    setup = Setup("A", "", systems.settings_of(SETTING, config), "", None, None)
    moved = replace(config, data=replace(config.data, path="/b/text", tokenizer="/b/model.gguf"))
    assert setup.is_as(replace(setup, settings=systems.settings_of(SETTING, moved)))
    more_rates = replace(SETTING, rates={"another": (1.0,)})
    assert setup.is_as(replace(setup, words="a", settings=systems.settings_of(more_rates, config)))
    for setting in (
        replace(SETTING, task=replace(TASK, slots=6)),
        replace(SETTING, task=replace(TASK, enough=0.6)),
        replace(SETTING, before=Population(5, 6)),
        replace(SETTING, background_batches=2),
    ):
        assert not setup.is_as(replace(setup, settings=systems.settings_of(setting, config)))
    trained = replace(config, train=replace(config.train, steps=7))
    assert not setup.is_as(replace(setup, settings=systems.settings_of(SETTING, trained)))
    # Configs that were kept before a field was added have its default.
    tree = json.loads(json.dumps(dataclasses.asdict(setup)))
    assert tree["settings"]["runs"][0]["train"].pop("slots_per_step") == 0
    assert Setup.of(tree) == setup


def test_sequences_that_diverge_are_counted_and_left_out(tmp_path):
    study = some_study()
    whole = study.sequences[0]
    ended = replace(whole, seed=1, left=whole.left[:1], kept=[0.8], bits_per_byte=[2.0])
    tables.write(replace(study, sequences=[ended, whole, study.sequences[1]]), tmp_path)
    report = (tmp_path / "forgetting.md").read_text().partition("one after the other")[2]
    rows = [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in report.splitlines() if "| A " in line
    ]
    of_all = ["62 %", "50 %", "75 %", "40 %", "2.500"]
    assert rows[:2] == [
        [METHODS[0].name, "0.001", "1", "1", *of_all],
        [METHODS[4].name, "0.001", "0", "1", *[""] * 5],
    ]
    nothing = [replace(of, left=[], kept=[], bits_per_byte=[]) for of in study.sequences]
    tables.write(replace(study, sequences=nothing), tmp_path)  # is no error


def test_a_mixture_has_its_share_of_people(tmp_path, monkeypatch):
    from experiments.forgetting import mixture
    from ultramem_jax.data.sources import FileSource

    (tmp_path / "background").write_bytes(b"background " * 20_000)
    monkeypatch.setattr(mixture, "enwik8_source", lambda path: FileSource("enwik8", tmp_path / path))
    people = Population(0, 5)
    path = write_mixture(tmp_path / "mixture", "background", 60_000, people, 0.4)
    text = path.read_text()
    assert len(text) >= 60_000
    of_people = sum(len(part) for part in text.split("\n\n") if "background" not in part)
    assert of_people / len(text) == pytest.approx(0.4, abs=0.02)
    for query in queries(people.people(), "statement", max_choices=1):
        assert text.count(query.answer) > 5
    assert write_mixture(path, "background", 60_000, people, 0.4).read_text() == text
    with pytest.raises(UserError, match="holds another text than that of these people; give another --work"):
        write_mixture(path, "background", 60_000, Population(0, 6), 0.4)
    assert path.read_text() == text
