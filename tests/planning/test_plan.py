"""`plan` prints and writes what it counts, and refuses bad input in one line."""

import dataclasses
import json

import jax
import pytest

from tests.support.here import Here
from tests.support.planned import DENSE, ROUND, TINY
from ultramem_jax import MeshConfig, RunConfig, UserError
from ultramem_jax.config import to_dict
from ultramem_jax.planning import tables, targets
from ultramem_jax.planning.plans import lookups, planned_runs
from ultramem_jax.presets import preset


def test_it_fits_as_long_as_the_memory_is_large_enough(compiled):
    total = compiled.bytes.total
    exact, less = (dataclasses.replace(ROUND, memory_bytes=size) for size in (total, total - 1))
    assert tables.fits(compiled.bytes, exact) and not tables.fits(compiled.bytes, less)


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.py"
    text = "from ultramem_jax.config import *\ndef get_config():\n    return run_config_from_dict({!r})\n"
    path.write_text(text.format(to_dict(TINY)))
    return path


def test_the_plan_is_printed_and_written(run, compiled, tiny_file, tmp_path):
    out = tmp_path / "plans" / "tiny.md"
    status, printed, err = run("plan", f"--config={tiny_file}", f"--out={out}")
    assert status == 0, err
    text = out.read_text()
    assert text in printed
    assert text.startswith("# Plan: tiny on data:2,memory:4 (8 × H100 SXM)\n")
    lines = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        lines.setdefault(cells[0], cells[1:])
    assert lines["parameters"] == [f"{4 * DENSE:,}"]
    assert lines["tables"] == ["2,048"] and lines["row moments"] == ["4,096"]
    assert lines["total"] == [f"{compiled.bytes.total:,}"] and lines["fits"] == ["yes"]
    assert lines["reads to owners"] == ["all-gather", "memory", "4", "2", "960", "960", "1.000"]
    assert lines["compute"][:2] == ["compute", "TFLOP"]
    assert "not a measurement" in text and "launch.py plan" in text
    numbers = json.loads(out.with_suffix(".json").read_text())
    of_plan = numbers["plans"]["slots"]
    assert of_plan["bytes"] == dataclasses.asdict(compiled.bytes)
    assert of_plan["config"]["mesh"]["memory"] == 4 and list(numbers["partition"]) == ["2", "4", "8"]


def test_a_target_compiles_and_names_the_hardware(run, tiny_file, monkeypatch):
    monkeypatch.setattr(targets, "load_target", lambda name: Here(name, "gpu", "a card", ""))
    status, printed, err = run("plan", f"--config={tiny_file}", "--target=h200")
    assert status == 0, err
    assert "# Plan: tiny on data:2,memory:4 (8 × H200 SXM)" in printed
    assert "compiled ahead of time by this machine's 1.0 for h200" in printed
    status, _, err = run("plan", f"--config={tiny_file}", "--target=cards/mine.txtpb")
    assert status == 2 and "--hardware = '': must be given for --target = 'cards/mine.txtpb'" in err

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: it does not fit\nand more")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    status, _, err = run("plan", f"--config={tiny_file}", "--target=h200")
    assert (
        status == 2
        and "the training step: the compiler refuses it: RESOURCE_EXHAUSTED: it does not fit\n" in err
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware=h10"], "unknown hardware 'h10': did you mean 'h100'?"),
        (["--hardware=nowhere.json"], "--hardware = 'nowhere.json': there is no such file"),
        (["--redraw"], "--out = '': must name the document that is made again"),
        (["--redraw", "--out=nowhere.md"], "nowhere.json: cannot be read, No such file"),
        (["--out=plan.txt"], "--out = 'plan.txt': must be the name of a .md file"),
        (["--partition=slot"], "unknown --partition 'slot': did you mean 'slots'?"),
        (["--baseline=mo"], "unknown --baseline 'mo': did you mean 'moe'?"),
        (["--config.mesh.memory=3"], "mesh.memory = 3: must divide num_slots of a table = 256"),
        (
            ["--partition=width", "--config.mesh.memory=16"],
            "mesh.memory = 16: must divide model.memories.memory.table.value_",
        ),
        (["--config.mesh.data=3"], "train.batch_size = 8: a micro-batch of 8 sequences does not divide"),
        (
            ["--config.mesh.data=64", "--config.train.batch_size=512"],
            "mesh: makes 256 devices, and JAX has been started with 8 (cpu)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(run, tiny_file, arguments, said):
    status, out, err = run("plan", f"--config={tiny_file}", *arguments)
    error = err.splitlines()[-1]
    assert (status, out) == (2, "") and error.startswith(f"error: {said}"), err
    assert len([line for line in err.splitlines() if not line.startswith("compiling")]) == 1


def test_a_model_without_memories_has_no_partition():
    config = RunConfig(preset("dense-tiny"), mesh=MeshConfig(data=8))
    assert list(planned_runs(config, "", "")) == ["model"]
    assert lookups(config, ROUND) is None
    with pytest.raises(UserError, match="--partition = 'width': must be empty for a model without memories"):
        planned_runs(config, "width", "")
    with pytest.raises(UserError, match="the base must have a memory"):
        planned_runs(config, "", "moe")
