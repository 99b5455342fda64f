"""Audits a training or decoding step as the compilers of GPUs and TPUs make it, without any of them.

The step is compiled for a target, and its text is searched for what costs time or memory there: copies of
tables, sorts of rows, atomic additions, solvers, dense expansions of ragged products, transfers to the host,
padded arrays. Each comes with the line of source that made it. What a budget forbids ends the command with an
error. The compilers are in requirements-audit.txt, for an environment of their own.

    ultramem audit --preset=ultramem-151m-x12 --target=h100,tpu-v5p --config.train.batch_size=16
    ultramem audit --out=audits

Without --target, the command audits all cases of the budget. It compiles only programs that --out does not
have yet, so that the same command goes on after an interruption.
"""

import logging
import pathlib

from absl import flags
from tqdm import tqdm

from ultramem_jax.cli import command_line
from ultramem_jax.config import RunConfig
from ultramem_jax.errors import UserError, at_least, choice, require
from ultramem_jax.files import replace_text
from ultramem_jax.planning import audit_tables
from ultramem_jax.planning.audit import (
    BUDGET,
    PROGRAMS,
    Audit,
    Auditor,
    Case,
    Limits,
    load,
    load_budget,
)
from ultramem_jax.planning.programs import resolved
from ultramem_jax.planning.targets import CARDS, TPUS, load_target
from ultramem_jax.reporting import markdown
from ultramem_jax.reporting.folders import make_folder

log = logging.getLogger(__name__)

BASE_CONFIG = RunConfig()
TARGET = flags.DEFINE_string(
    "target",
    "",
    f"comma-separated targets: {', '.join(CARDS)}, {', '.join(TPUS)}, a TPU with its topology "
    "(tpu-v5p:2x2x1), or a text proto that describes a card; empty: the cases of --budget",
)
PROGRAM = flags.DEFINE_string(
    "program", ",".join(PROGRAMS), "comma-separated programs to audit with --target"
)
CACHE_LENGTH = flags.DEFINE_integer("cache_length", Case.cache_length, "cache positions of the decoding step")
BUDGET_FILE = flags.DEFINE_string(
    "budget", "", "JSON file with cases and limits; empty: the budget that comes with the library"
)
REDRAW = flags.DEFINE_bool("redraw", False, "compile nothing: write README.md again from the files in --out")
OUT = flags.DEFINE_string(
    "out", "", "folder for a JSON file per case and a README.md of all; empty: only print"
)


def main() -> None:
    """Audits, prints and writes what was found, and fails where the budget is broken."""
    cases, limits = load_budget(pathlib.Path(BUDGET_FILE.value) if BUDGET_FILE.value else BUDGET)
    first = [case.title for case in cases]
    folder = pathlib.Path(OUT.value) if OUT.value else None
    if REDRAW.value:
        require(folder is not None, "--out", OUT.value, "must name the folder that README.md is made from")
        assert folder is not None
        _refuse_broken(_write(folder, limits, first), limits)
        return
    if TARGET.value:
        cases = _cases()
    else:
        _require_no_config()
    if folder:
        make_folder(folder, "--out")
    done: list[Audit] = []
    refused: list[str] = []
    with tqdm(cases, unit="program", dynamic_ncols=True) as bar:
        for case in bar:
            bar.set_postfix_str(case.title)
            try:
                done.append(Auditor(case, folder).audit())
            except UserError as error:  # the other cases are audited nevertheless
                refused.append(f"{case.title}: {error}")
                continue
            if folder:
                _write(folder, limits, first)
    if folder and done:
        print(markdown.table(audit_tables.summary_rows(done, limits)))
    elif done:
        print(audit_tables.document(done, limits))
    if refused:
        raise UserError(refused[0] + _and_more(refused))
    _refuse_broken(done, limits)


def _refuse_broken(done: list[Audit], limits: Limits) -> None:
    broken = [f"{one.case.title}: {line}" for one in done for line in one.broken(limits)]
    if broken:
        raise UserError(f"the budget is broken: {broken[0]}{_and_more(broken)}")


def _and_more(lines: list[str]) -> str:
    return f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""


def _write(folder: pathlib.Path, limits: Limits, first: list[str]) -> list[Audit]:
    """Writes README.md from all audits in the folder, those of the titles `first` before all others."""
    order = {title: number for number, title in enumerate(first)}
    files = sorted(folder.glob("*.json"), key=lambda path: (order.get(path.stem, len(order)), path.stem))
    require(bool(files), "--out", str(folder), "must hold audits, the JSON files that this command writes")
    audits = []
    for path in files:
        try:
            audits.append(load(path))
        except UserError as error:  # of an older release, for example; the audit of its case replaces it
            log.warning("left out of %s: %s", folder / "README.md", error)
    replace_text(folder / "README.md", audit_tables.document(audits, limits))
    return audits


def _require_no_config() -> None:
    """Refuses flags that the cases of a budget do not heed."""
    given = [name for name in ("program", "cache_length") if flags.FLAGS[name].present]
    require(
        not given and command_line.run_config() == BASE_CONFIG,
        "--target",
        "",
        "must name a target to audit a config of your own; without one, the cases of the budget are audited",
    )


def _cases() -> list[Case]:
    at_least(1, cache_length=CACHE_LENGTH.value)
    programs = PROGRAM.value.split(",")
    for program in programs:
        choice("--program", program, PROGRAMS)
    targets = TARGET.value.split(",")
    require(all(targets), "--target", TARGET.value, "must be targets, separated by commas")
    for target in targets:
        load_target(target)
    config, name = resolved(command_line.run_config()), command_line.config_name()
    return [
        Case(name, config, program, target, CACHE_LENGTH.value)
        for target in targets
        for program in PROGRAMS
        if program in programs
    ]
