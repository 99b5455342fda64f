"""Reads one checkpoint: restores its state onto any devices, and compares it with what the reader expects.

`checkpoints.py` says what a checkpoint consists of, and chooses which one is read.
"""

import dataclasses
import functools
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import KeyPath

from ultramem_jax.config import RunConfig, run_config_from_dict, to_dict
from ultramem_jax.errors import UserError
from ultramem_jax.parallel.table_layouts import laid_out
from ultramem_jax.training.large_arrays import LARGE_BYTES, array_name, read_large_array
from ultramem_jax.training.undo_log import UndoRows, put_back
from ultramem_jax.tree_types import ArrayTree, JsonDict

Differences: TypeAlias = dict[str, tuple[Any, Any]]
"""Fields in which two configurations differ: dotted name -> (value there, value here)."""

UNDO_LOG = "undo.npz"
_MESSAGE_ENTRIES = 8
"""Number of differences that an error message spells out. The rest are only counted."""


@dataclass(frozen=True)
class Meta:
    """Holds what a checkpoint says about itself."""

    step: int
    config: JsonDict
    """The run's configuration as `ultramem_jax.config.to_dict` gives it, read back from JSON."""
    corpus: JsonDict
    """Hashes and sizes of the text, and the hash of the tokenizer (`continuing.corpus_identity`)."""
    versions: dict[str, str]
    """Versions of Python and of the libraries that wrote the checkpoint."""
    validation_loss: float | None = None
    """The loss that `Checkpoints.mark` was given; None where the run did not evaluate at that step."""
    since_record: dict[str, float] = dataclasses.field(default_factory=dict)
    """Sums over the steps since the last training record: `steps`, `nats`, `bytes` (`training.window`). The
    next record is made from them."""

    def __post_init__(self) -> None:
        # JSON has no types. After this check, readers may rely on them.
        for name, kinds in _META_KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"meta: {name} is a {type(value).__name__}")
        for name, value in self.since_record.items():
            if not isinstance(value, int | float):
                raise ValueError(f"meta: since_record.{name} is a {type(value).__name__}")


_META_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "config": dict,
    "corpus": dict,
    "versions": dict,
    "validation_loss": (int, float, type(None)),
    "since_record": dict,
}


def load_meta(directory: Path) -> Meta:
    """Returns what the checkpoint at `directory` says about itself.

    A damaged one raises whatever error results.

    Raises:
        UserError: it holds fields that this version does not know.
    """
    found = ocp.JsonCheckpointHandler().restore(epath.Path(directory / "meta"))
    if not isinstance(found, dict):
        raise ValueError(f"meta is a {type(found).__name__}")
    if more := found.keys() - {field.name for field in dataclasses.fields(Meta)}:
        # The checkpoint may well be whole: a run must not resume from an older one and delete it.
        known = f"checkpoint at {directory} has {', '.join(sorted(more))} in its meta"
        raise UserError(f"{known}: a later version of this program wrote it")
    meta = Meta(**found)
    if str(meta.step) != directory.name:
        raise ValueError(f"meta is of step {meta.step}")
    return meta


def saved_config(directory: Path, config: JsonDict) -> RunConfig:
    """Returns the configuration that a checkpoint holds, also where an older version wrote it.

    Fields that did not exist then get their defaults.

    Args:
        directory: folder of the checkpoint.
        config: its `Meta.config`.

    Raises:
        UserError: it is not the configuration of a run.
    """
    try:
        return run_config_from_dict(config)
    except UserError as error:
        raise UserError(f"checkpoint at {directory} has no valid config: {error}") from None


def read_state(directory: Path, abstract_state: ArrayTree, partial: bool) -> ArrayTree:
    """Returns the state of one checkpoint; with `partial`, only the top-level entries of `abstract_state`.

    Raises:
        UserError: the checkpoint holds other entries, shapes or dtypes.
    """
    handler = ocp.PyTreeCheckpointHandler()
    path = epath.Path(directory / "state")
    _require_same_tree(directory, handler.metadata(path).tree, abstract_state, partial)
    target = jax.tree.map(_with_sharding, abstract_state)
    undo, large = UndoRows(directory / UNDO_LOG), {}

    def leave_out_large(key: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | None:
        name = array_name(key)
        if name not in undo and leaf.size * leaf.dtype.itemsize <= LARGE_BYTES:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        large[name] = leaf
        return None

    small = jax.tree_util.tree_map_with_path(leave_out_large, target)
    restore_args = ocp.checkpoint_utils.construct_restore_args(small)
    args = ocp.args.PyTreeRestore(item=small, restore_args=restore_args, partial_restore=True)
    # The handler reads directly. A `Checkpointer` would wait for processes that may fail or be absent.
    small = handler.restore(path, args=args)
    handler.close()
    # Orbax leaves the host buffers that it read into in reference cycles, and they must be freed now.
    gc.collect()

    def filled(key: KeyPath, leaf: jax.ShapeDtypeStruct, restored: jax.Array | None) -> jax.Array:
        if restored is not None:
            return laid_out(restored, leaf)
        name = array_name(key)
        change = functools.partial(put_back, shape=large[name].shape, undo=undo.read(name))
        return read_large_array(directory / "state", name, large[name], change)

    return jax.tree_util.tree_map_with_path(filled, target, small)


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without one, Orbax takes the sharding of the run that saved, which this machine may not have.
    if leaf.sharding is not None:
        return leaf
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same_tree(directory: Path, saved_tree: ArrayTree, wanted_tree: ArrayTree, partial: bool) -> None:
    saved, wanted = _entries(saved_tree), _entries(wanted_tree)
    if partial:
        roots = {name.split(".")[0] for name in wanted}
        saved = {name: kind for name, kind in saved.items() if name.split(".")[0] in roots}
    names = [*wanted, *(name for name in saved if name not in wanted)]
    differences = [
        f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        raise UserError(f"checkpoint at {directory} holds another state: {_listed(differences)}")


def _entries(tree: ArrayTree) -> dict[str, str]:
    """Returns the dotted names of the leaves, with dtype and shape: {"params.w": "float32[3,4]"}."""
    return {
        ".".join(map(str, path)): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in ocp.tree.to_flat_dict(tree).items()
    }


def require_same_model(directory: Path, there: JsonDict, here: JsonDict) -> None:
    """Refuses a checkpoint whose model, or tokenizer, is not that of this run.

    Args:
        directory: folder of the checkpoint.
        there: its configuration.
        here: that of this run, from `ultramem_jax.config.to_dict`.

    Raises:
        UserError: a field differs; the message names all that do.
    """
    there, here = (_of_model(to_dict(saved_config(directory, config))) for config in (there, here))
    differing = differences(there, here)
    if differing:
        clauses = [f"{name} is {shown(a)} there and {shown(b)} here" for name, (a, b) in differing.items()]
        raise UserError(f"checkpoint at {directory} is of another model: {_listed(clauses)}")


def _of_model(config: JsonDict) -> JsonDict:
    """Returns the fields that define a model.

    These are all except where its tables lie, when their rows are gathered and how it is compiled. A run may
    change those.
    """
    model = {name: value for name, value in config["model"].items() if name != "scan_layers"}
    memories = {}
    for group, memory in model["memories"].items():
        where = ("memory_kind", "partition", "prefetch")
        table = {name: value for name, value in memory["table"].items() if name not in where}
        memories[group] = memory | {"table": table}
    model = model | {"memories": memories}
    # A tokenizer from a file is known by its hash, which is compared elsewhere: the file may have moved.
    tokenizer = config["data"]["tokenizer"]
    kind = tokenizer if tokenizer in ("bytes", "bpe") else "a file's"
    return {"model": model, "data": {"tokenizer": kind}}


def differences(there: Any, here: Any, name: str = "") -> Differences:
    """Returns the fields in which two nested dicts differ: dotted names to both values, None where absent."""
    if isinstance(there, dict) and isinstance(here, dict):
        found: Differences = {}
        for field in [*there, *(field for field in here if field not in there)]:
            inner = f"{name}.{field}" if name else field
            found |= differences(there.get(field), here.get(field), inner)
        return found
    return {} if there == here else {name: (there, here)}


def shown(value: object) -> str:
    """Returns a value of a configuration as a message shows it. A dict of fields is shown only as `given`."""
    return "given" if isinstance(value, dict) else repr(value)


def _listed(clauses: list[str]) -> str:
    more = len(clauses) - _MESSAGE_ENTRIES
    return "; ".join(clauses[:_MESSAGE_ENTRIES]) + (f"; and {more} more" if more > 0 else "")
