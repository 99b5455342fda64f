"""Plans a training run on a mesh that is not there: bytes, collectives and time of a step, per device.

The step is compiled ahead of time for simulated devices, with abstract arrays: it takes no memory to speak of
and needs no accelerator. The mesh is that of the run, --mesh=data:16,memory:64; along `data` there is one
device if it is not named or 0. What comes out: what a device holds and whether it fits, what devices send
each other and what for, beside the formulas for it, an estimate of the time of a step from published rates,
and which way of splitting tables sends least.

    python launch.py plan --preset=ultramem-151m-x12 --mesh=data:4,memory:16 --config.train.batch_size=256
"""

import pathlib

from absl import flags

from ultramem_jax.cli import command_line
from ultramem_jax.config import RunConfig
from ultramem_jax.errors import require
from ultramem_jax.planning.baseline import BASELINES
from ultramem_jax.planning.compiled_step import resolved
from ultramem_jax.planning.hardware import HARDWARE, load_hardware
from ultramem_jax.planning.plans import lookups, make_plan, planned_runs
from ultramem_jax.planning.records import PlanStudy
from ultramem_jax.planning.tables import make_folder, redraw, render, write
from ultramem_jax.reporting.environment import describe_environment

BASE_CONFIG = RunConfig()
HARDWARE_NAME = flags.DEFINE_string(
    "hardware", "h100", f"{', '.join(HARDWARE)}, or a JSON file with the fields of plan_hardware.Hardware"
)
PARTITION = flags.DEFINE_string(
    "partition",
    "",
    "ways to split tables, `slots`, `width` or `both`, with commas between them; empty: that of the config",
)
BASELINE = flags.DEFINE_string(
    "baseline",
    "",
    f"also plan a Mixture of Experts of equal FLOPs and sparse parameters: {' or '.join(BASELINES)}",
)
REDRAW = flags.DEFINE_bool("redraw", False, "compile nothing: the document of the FILE.json beside --out")
OUT = flags.DEFINE_string("out", "", "FILE.md to write, with FILE.json of all numbers; empty: print alone")


def main() -> None:
    """Prints the plan, and writes it if there is somewhere to."""
    out = OUT.value and pathlib.Path(OUT.value)
    require(not out or out.suffix == ".md", "--out", OUT.value, "must be the name of a .md file")
    if REDRAW.value:
        require(bool(out), "--out", OUT.value, "must name the document that is made again")
        redraw(pathlib.Path(out))
        return
    hardware = load_hardware(HARDWARE_NAME.value)
    if out:
        make_folder(out.parent)
    runs = planned_runs(resolved(command_line.run_config()), PARTITION.value, BASELINE.value)
    plans = [make_plan(name, config, note, hardware) for name, (config, note) in runs.items()]
    partitions = lookups(plans[0].config, hardware)
    study = PlanStudy(command_line.config_name(), plans, hardware, partitions, describe_environment())
    text = render(study)
    print(text)
    if out:
        write(out, text, study)
