"""Audits programs as the compilers of accelerators make them: what is in them, and whether a budget holds.

A case is a model, a program (a training or a decoding step) and a target. The verdict compares what
`planning.findings` finds with the limits of a budget. It compares temporaries with what
`accounting.temporaries` derives from shapes before anything is compiled.
"""

import dataclasses
import gzip
import hashlib
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax

from ultramem_jax.accounting.temporaries import decoding_temporaries, training_temporaries
from ultramem_jax.config import RunConfig, run_config_from_dict, to_dict
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import UserError
from ultramem_jax.ops.algorithms import algorithms
from ultramem_jax.parallel.collectives import collectives_in, summary
from ultramem_jax.parallel.program_text import read_program
from ultramem_jax.planning.compiled_step import shard_bytes
from ultramem_jax.planning.findings import CONTENDED, NOTHING, VERSION, Finding, Findings, find
from ultramem_jax.planning.programs import (
    decoding_program,
    devices_for,
    mesh_sizes,
    resolved,
    training_program,
)
from ultramem_jax.planning.targets import load_target
from ultramem_jax.platforms import LANES, targeting
from ultramem_jax.presets import preset
from ultramem_jax.reporting.records import keep_record, kept_record
from ultramem_jax.tree_types import JsonDict

log = logging.getLogger(__name__)

ProgramName: TypeAlias = Literal["train", "decode"]
PROGRAMS: tuple[ProgramName, ...] = ("train", "decode")
BUDGET = pathlib.Path(__file__).with_name("budget.json")
"""The cases that `make audit` compiles, and the limits that they must keep."""


@dataclass(frozen=True)
class Limits:
    """Holds what a program may contain at most."""

    table_copies: int
    sorted_row_width: int
    """Widest row that may be sorted; arrays of one axis may be sorted at any length."""
    atomic_scatters: int
    """Scatters that combine floats at indices that may be equal, or that are a loop over indices."""
    solvers: int
    dense_ragged: int
    host_transfers: int
    unbounded_loops: int
    new_result_bytes: int
    """Bytes of results that are not written in place of arguments: metrics and tokens, but no state."""
    temporaries_ratio: float
    """Largest temporaries, over those that accounting derives."""


@dataclass(frozen=True)
class Case:
    """Names a program to audit."""

    name: str
    """Name of the model, for files and tables."""
    config: RunConfig
    program: ProgramName
    target: str
    cache_length: int = 2048
    """Cache positions of a decoding step; its batch is `train.batch_size`."""
    whole_layers: int = 0
    """Layers of the model, if only some of them are audited, because the compiler needs hours for all; else
    0."""

    @property
    def layers(self) -> str:
        """Returns the number of layers in words."""
        number = self.config.model.num_layers
        return f"{number} of {self.whole_layers}" if self.whole_layers else str(number)

    @property
    def title(self) -> str:
        """Returns the name of the case, which is also that of its file."""
        # A card's description has a path.
        target = pathlib.PurePath(self.target).stem.replace(":", "-")
        return f"{self.name}_{target}_{self.program}"


@dataclass(frozen=True)
class Audit:
    """Holds what the compiler made of a case."""

    case: Case
    compiler: str
    """Package of the compiler and its version; and that of JAX."""
    program: str
    """Digest of all that the compiler is given. A program with the same one is not compiled again."""
    finder: int
    """`findings.VERSION` of the search. After another one, the program's text is searched again."""
    seconds: float
    """Seconds to lower and to compile."""
    arguments: int
    """Bytes of the arguments on one device, padding included."""
    argument_padding: int
    """Bytes of the arguments that are padding of layouts."""
    temporaries: int
    """Bytes that the program holds beside its arguments."""
    expected_temporaries: Mapping[str, int]
    """Temporaries that accounting derived before compiling, in bytes by part."""
    not_aliased: int
    """Bytes of results that are not written in place of arguments."""
    findings: Findings
    collectives: Mapping[str, int]
    """Bytes that a device sends in one run, by kind and axes."""

    @property
    def expected(self) -> int:
        """Returns the temporaries that accounting derived, in bytes."""
        return sum(self.expected_temporaries.values())

    def broken(self, limits: Limits) -> list[str]:
        """Returns the limits that the program breaks, each in one line that names the source."""
        found = self.findings
        wide = [sort for sort in found.sorts if sort.width > limits.sorted_row_width]
        atomic = [scatter for scatter in found.scatters if scatter.what.startswith(CONTENDED)]
        # Only a GPU asks the host before each pass.
        loops = [] if self.case.target.startswith("tpu") else found.unbounded_loops
        counted: tuple[tuple[str, Sequence[Finding], int], ...] = (
            ("copies of tables", found.table_copies, limits.table_copies),
            (f"sorts of rows wider than {limits.sorted_row_width}", wide, 0),
            ("scatters that are atomic or one by one", atomic, limits.atomic_scatters),
            ("solvers", found.solvers, limits.solvers),
            ("dense expansions of ragged products", found.dense_ragged, limits.dense_ragged),
            ("transfers to the host", found.host_transfers, limits.host_transfers),
            ("loops of unknown length", loops, limits.unbounded_loops),
        )
        lines = [
            f"{name}: {len(found)}, at most {most}: "
            + "; ".join(f"{one.what} ({one.source or 'source unknown'})" for one in found[:3])
            for name, found, most in counted
            if len(found) > most
        ]
        if len(found.table_copies) > limits.table_copies and (crowded := _crowded_table(self.case)):
            # First, as it is the cause.
            lines.insert(0, f"{crowded}: gradients of rows count as copies; audit a smaller batch")
        if self.not_aliased > limits.new_result_bytes:
            lines.append(
                f"results in new arrays: {self.not_aliased:,} bytes, at most {limits.new_result_bytes:,}; "
                "the state is not updated in place"
            )
        if self.temporaries > limits.temporaries_ratio * self.expected:
            lines.append(
                f"temporaries: {self.temporaries:,} bytes, {self.temporaries / self.expected:.2f} times the "
                f"{self.expected:,} that accounting derives, at most {limits.temporaries_ratio}"
            )
        return lines


def load_budget(path: pathlib.Path = BUDGET) -> tuple[list[Case], Limits]:
    """Reads the cases and limits of a budget.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    with kept_record(path, "a budget") as tree:
        limits = Limits(**tree["limits"])
        if not all(isinstance(limit, int | float) for limit in tree["limits"].values()):
            raise TypeError("limits must be numbers")
        if not tree["models"]:
            raise ValueError("models is empty")
        cases = [
            _case(name, model, program, target, how)
            for target in {target: None for model in tree["models"].values() for target in model["targets"]}
            for name, model in tree["models"].items()
            for program in PROGRAMS
            if program in model and (how := model["targets"].get(target)) is not None
        ]
    return cases, limits


def _case(name: str, model: JsonDict, program: ProgramName, target: str, how: JsonDict) -> Case:
    of, trains = model[program], program == "train"
    load_target(target)
    config = _merged(to_dict(preset(model["preset"])), model.get("changes", {}))
    layers, batch_size = config["num_layers"], of["batch_size"]
    if trains:
        config["num_layers"] = how.get("train_layers", layers)
        # Where a step reads more rows than its tables have, gradients of rows cannot be told from copies.
        batch_size = how.get("train_batch", batch_size)
    run = run_config_from_dict(
        {
            "model": config,
            "data": {"seq_len": of["seq_len"]} if trains else {},
            "train": {"batch_size": batch_size, "remat": of.get("remat", "none")},
            # A model decodes on one device.
            "mesh": how.get("mesh", {}) if trains else {},
        }
    )
    return Case(
        name,
        resolved(run),
        program,
        target,
        of.get("cache_length", Case.cache_length),
        layers if config["num_layers"] < layers else 0,
    )


def _crowded_table(case: Case) -> str:
    """Returns the table of which a training step reads more rows than it has, and both numbers, or ""."""
    train, tokens = case.config.train, case.config.train.batch_size * case.config.data.seq_len
    if case.program != "train" or train.table_gradient == "dense":
        return ""
    for name, readers in table_readers(case.config.model).items():
        rows, reads = readers[0].num_slots, tokens * readers[0].config.reads_per_token * len(readers)
        if reads >= rows:
            return f"a step reads {reads:,} rows of {name}, which has {rows:,}"
    return ""


def _merged(one: JsonDict, other: JsonDict) -> JsonDict:
    """Returns a tree with the values of another one in place of its own."""
    both = dict(one)
    for key, value in other.items():
        held = both.get(key)
        both[key] = _merged(held, value) if isinstance(value, dict) and isinstance(held, dict) else value
    return both


class Auditor:
    """Audits a case: lowers its program, and compiles it unless a folder has an audit of the same program."""

    def __init__(self, case: Case, folder: pathlib.Path | None = None):
        """Lowers the program, and derives its temporaries.

        Args:
            case: what to audit.
            folder: where audits are kept, with the compressed text of their programs; None for nowhere.

        Raises:
            UserError: the target's compiler is missing, or the mesh does not fit.
        """
        self._case, self._folder, self._started = case, folder, time.perf_counter()
        target, config = load_target(case.target), case.config
        with targeting(target.platform):
            chosen = algorithms()
        groups = chosen.experts == "groups"
        if case.program == "train":
            sizes = mesh_sizes(config.mesh)
            self._expected = training_temporaries(
                config,
                sizes,
                chosen.chunk_values,
                groups,
                row_multiple=LANES if chosen.layouts == "wide" else 1,
            )
            self._program = training_program(config, devices_for(config, target), target)
            state = self._program.arguments[0]
            held = jax.tree.leaves((state.tables, state.table_state))
        else:
            model, batch, length = config.model, config.train.batch_size, case.cache_length
            self._expected = decoding_temporaries(
                model, batch, length, groups, by_ranks=chosen.selection == "ranks"
            )
            self._program = decoding_program(model, batch, length, target.devices(1)[0], target)
            held = jax.tree.leaves(self._program.arguments[0].get("memory", {}))
        self._tables = _table_shapes(held)
        self._compiler = f"{target.compiler}, jax {jax.__version__}"
        given = (
            self._compiler,
            target.kind,
            target.topology,
            os.environ.get("XLA_FLAGS", ""),
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            self._program.lowered.as_text(),
        )
        self._digest = hashlib.sha256("\n".join(given).encode()).hexdigest()[:16]

    def audit(self) -> Audit:
        """Returns the audit, which is kept in the folder: compiles the program if that is needed.

        Raises:
            UserError: the compiler refuses the program.
        """
        kept = self._kept()
        done = self._current(kept) if kept else self._compile()
        done = dataclasses.replace(done, case=self._case, expected_temporaries=self._expected)
        if self._folder is not None and done != kept:
            save(done, self._folder)
        return done

    def _kept(self) -> Audit | None:
        """Returns the audit of the same program that the folder has, or None."""
        if self._folder is None or not (path := self._record_path(self._folder)).is_file():
            return None
        try:
            found = load(path)
        except UserError as error:
            log.info("%s: audited again: %s", self._case.title, error)
            return None
        return found if found.program == self._digest else None

    def _current(self, kept: Audit) -> Audit:
        """Returns an audit as the search of this release finds it."""
        assert self._folder is not None
        text = self._text_path(self._folder)
        if kept.finder == VERSION:
            return kept
        if not text.is_file():
            return self._compile()
        return self._searched(kept, gzip.decompress(text.read_bytes()).decode())

    def _compile(self) -> Audit:
        compiled = self._program.compile("the program")
        memory = compiled.memory_analysis()
        assert memory is not None, "the compiler gives no figures of memory"
        arguments = int(memory.argument_size_in_bytes + memory.host_argument_size_in_bytes)
        exact = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(self._program.arguments))
        text = compiled.as_text() or ""
        if self._folder is not None:
            # A record is never beside the text of another program.
            self._record_path(self._folder).unlink(missing_ok=True)
            self._text_path(self._folder).write_bytes(gzip.compress(text.encode()))
        done = Audit(
            case=self._case,
            compiler=self._compiler,
            program=self._digest,
            finder=VERSION,
            seconds=time.perf_counter() - self._started,
            arguments=arguments,
            argument_padding=max(arguments - exact, 0),
            temporaries=int(memory.temp_size_in_bytes),
            expected_temporaries=self._expected,
            not_aliased=int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
            findings=NOTHING,
            collectives={},
        )
        return self._searched(done, text)

    def _searched(self, audit: Audit, text: str) -> Audit:
        """Returns the audit with what is in the text of its program."""
        program = read_program(text)
        sent = summary(collectives_in(program, self._program.axes.mesh)).items()
        return dataclasses.replace(
            audit,
            finder=VERSION,
            findings=find(program, self._tables),
            collectives={
                f"{kind} along {' × '.join(axes) or 'no axis'}": count for (kind, axes), count in sent
            },
        )

    def _record_path(self, folder: pathlib.Path) -> pathlib.Path:
        return folder / f"{self._case.title}.json"

    def _text_path(self, folder: pathlib.Path) -> pathlib.Path:
        return folder / f"{self._case.title}.hlo.gz"


def _table_shapes(held: Sequence[jax.ShapeDtypeStruct]) -> list[tuple[int, ...]]:
    shapes = (leaf.sharding.shard_shape(leaf.shape) for leaf in held if leaf.sharding is not None)
    return sorted({shape for shape in shapes if shape})


def save(result: Audit, folder: pathlib.Path) -> None:
    """Writes an audit as JSON into a folder, under the title of its case."""
    tree = dataclasses.asdict(result)
    tree["case"]["config"] = to_dict(result.case.config)
    keep_record(folder / f"{result.case.title}.json", tree)


def load(path: pathlib.Path) -> Audit:
    """Reads what `save` wrote.

    Raises:
        UserError: the file cannot be read, or holds no audit.
    """
    with kept_record(path, "an audit") as tree:
        case = Case(**tree["case"] | {"config": run_config_from_dict(tree["case"]["config"])})
        found: JsonDict = {
            name: value if isinstance(value, int) else tuple(Finding(**one) for one in value)
            for name, value in tree["findings"].items()
        }
        whole: JsonDict = tree | {"case": case, "findings": Findings(**found)}
        return Audit(**whole)
