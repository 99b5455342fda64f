"""Plans a training run on any mesh, without its devices: bytes, collectives and time of a step, per device.

The step is compiled ahead of time, with abstract arrays. This needs no accelerator and little memory. It is
compiled for simulated devices of the CPU, or with --target by the compiler of a GPU or TPU (see `audit`). The
mesh is that of the run, for example --mesh=data:16,memory:64; the axis `data` has one device if it is not
named or is 0. The plan contains:

- the bytes that a device holds, and whether they fit;
- the bytes that devices send to each other, by purpose, beside the formulas for them;
- an estimate of the time of a step, from published rates;
- the bytes that each way of splitting a table sends, and which way sends least.

    ultramem plan --preset=ultramem-151m-x12 --mesh=data:4,memory:16 --config.train.batch_size=256
    ultramem plan --preset=ultramem-151m-x12 --mesh=memory:4 --target=tpu-v5p:2x2x1
"""

import pathlib

from absl import flags

from ultramem_jax.cli import command_line
from ultramem_jax.config import RunConfig
from ultramem_jax.errors import require
from ultramem_jax.planning.baseline import BASELINES
from ultramem_jax.planning.hardware import HARDWARE, load_hardware
from ultramem_jax.planning.plans import lookups, make_plan, planned_runs
from ultramem_jax.planning.programs import resolved
from ultramem_jax.planning.records import PlanStudy
from ultramem_jax.planning.tables import redraw, render, write
from ultramem_jax.planning.targets import CARDS, TPUS, load_target
from ultramem_jax.reporting.environment import describe_environment
from ultramem_jax.reporting.folders import make_folder

BASE_CONFIG = RunConfig()
HARDWARE_NAME = flags.DEFINE_string(
    "hardware",
    "",
    f"{', '.join(HARDWARE)}, or a JSON file with the fields of planning.hardware.Hardware; empty: that of "
    "--target, or h100 without one",
)
TARGET = flags.DEFINE_string(
    "target",
    "",
    f"compile for {', '.join(CARDS)}, {', '.join(TPUS)}, a TPU with its topology (tpu-v5p:8x8x16), or a text "
    "proto that describes a card; empty: for simulated devices of the CPU",
)
PARTITION = flags.DEFINE_string(
    "partition",
    "",
    "comma-separated ways to split tables, of `slots`, `width` and `both`; empty: that of the config",
)
BASELINE = flags.DEFINE_string(
    "baseline",
    "",
    f"also plan a Mixture of Experts of equal FLOPs and sparse parameters: {' or '.join(BASELINES)}",
)
REDRAW = flags.DEFINE_bool(
    "redraw", False, "compile nothing: write the document of --out again from its FILE.json"
)
OUT = flags.DEFINE_string(
    "out", "", "FILE.md to write, with all numbers in FILE.json; empty: only print the plan"
)


def main() -> None:
    """Prints the plan, and writes it to files if --out is given."""
    out = OUT.value and pathlib.Path(OUT.value)
    require(not out or out.suffix == ".md", "--out", OUT.value, "must be the name of a .md file")
    if REDRAW.value:
        require(bool(out), "--out", OUT.value, "must name the document that is made again")
        redraw(pathlib.Path(out))
        return
    hardware = load_hardware(HARDWARE_NAME.value or _hardware_of_target())
    target = load_target(TARGET.value) if TARGET.value else None
    if out:
        make_folder(out.parent, "--out")
    runs = planned_runs(resolved(command_line.run_config()), PARTITION.value, BASELINE.value)
    plans = [make_plan(name, config, note, hardware, target) for name, (config, note) in runs.items()]
    partitions = lookups(plans[0].config, hardware)
    study = PlanStudy(command_line.config_name(), plans, hardware, partitions, describe_environment())
    text = render(study)
    print(text)
    if out:
        write(out, text, study)


def _hardware_of_target() -> str:
    """Returns the name of the hardware that --target compiles for."""
    if not TARGET.value:
        return "h100"
    name = TARGET.value.partition(":")[0]
    require(name in HARDWARE, "--hardware", "", f"must be given for --target = {TARGET.value!r}")
    return name
