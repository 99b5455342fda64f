"""Measures the library on this machine's accelerator, part by part, under a time limit.

In order of value: it times the candidates for every operation, compares training with the CPU, and times a
memory layer, whole models, decoding and tables in host memory. Each part has a process and a limit of its
own, and the report is written after every part. Benchmarks are programs of a clone, and left out elsewhere.

    ultramem accelerator --seconds=420 --out=accelerator
"""

import pathlib
import sys

from absl import flags

from ultramem_jax.accelerator.parts import PARTS, run_all, run_part
from ultramem_jax.errors import UserError, choice, require
from ultramem_jax.reporting.folders import make_folder

BASE_CONFIG = None
SECONDS = flags.DEFINE_float("seconds", 420, "time for all parts", lower_bound=1)
OUT = flags.DEFINE_string("out", "accelerator", "folder for records, logs and the report README.md")
SMALL = flags.DEFINE_bool("small", False, "small sizes, to try the command on a CPU")
PART = flags.DEFINE_string("part", "", "run only this part, in this process")
REFERENCES = flags.DEFINE_string(
    "references", "", "folder of reference vectors to compare with, NAME.npz and NAME.json; empty: none"
)


def main() -> None:
    """Runs all parts, or one."""
    references = pathlib.Path(REFERENCES.value) if REFERENCES.value else None
    require(
        references is None or any(references.glob("*.npz")),
        "--references",
        REFERENCES.value,
        "must be a folder with .npz files",
    )
    folder = make_folder(OUT.value, "--out")
    if PART.value:
        choice("--part", PART.value, tuple(part.name for part in PARTS if not part.arguments))
        run_part(PART.value, folder, SMALL.value, references)
        return

    def again(part: str) -> list[str]:
        flag = [f"--part={part}", f"--out={folder}", f"--references={REFERENCES.value}"]
        flag += ["--small"] if SMALL.value else []
        return [sys.executable, "-m", "ultramem_jax", "accelerator", *flag]

    if not run_all(pathlib.Path(folder), SECONDS.value, again, SMALL.value):
        raise UserError(
            f"--seconds = {SECONDS.value:g}: not all parts ended well; {folder}/README.md says which"
        )
    print(f"report: {folder}/README.md")
