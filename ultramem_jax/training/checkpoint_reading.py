"""Reading one checkpoint: its state onto any devices, and the comparison with what is to be read.

`checkpoints.py` says what a checkpoint is made of, and chooses which one is read.
"""

import dataclasses
import functools
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ultramem_jax.errors import UserError
from ultramem_jax.memory_config import MemoryConfig
from ultramem_jax.training.large_arrays import LARGE_BYTES, array_name, read_large_array
from ultramem_jax.training.undo_log import UndoRows, put_back

PyTree = Any

UNDO_LOG = "undo.npz"
_MESSAGE_ENTRIES = 8
"""Differences that an error message spells out; the rest are counted."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    step: int
    config: dict[str, Any]
    """The run's configuration as `ultramem_jax.config.to_dict` gives it, after a trip through JSON."""
    corpus: dict[str, Any]
    versions: dict[str, str]
    """Of Python and the libraries that wrote it."""
    validation_loss: float | None = None
    """As given to `save`; None where the run did not evaluate at that step."""


def load_meta(directory: Path) -> Meta:
    """What the checkpoint at `directory` says about itself; raises whatever its damage leads to."""
    return Meta(**ocp.JsonCheckpointHandler().restore(epath.Path(directory / "meta")))


def read_state(directory: Path, abstract_state: PyTree, partial: bool) -> PyTree:
    """The state of one checkpoint; with `partial`, the top-level entries of `abstract_state` alone."""
    handler = ocp.PyTreeCheckpointHandler()
    path = epath.Path(directory / "state")
    _require_same_tree(directory, handler.metadata(path).tree, abstract_state, partial)
    target = jax.tree.map(_with_sharding, abstract_state)
    undo, large = UndoRows(directory / UNDO_LOG), {}

    def leave_out_large(key: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | None:
        name = array_name(key)
        if name not in undo and leaf.size * leaf.dtype.itemsize <= LARGE_BYTES:
            return leaf
        large[name] = leaf
        return None

    small = jax.tree_util.tree_map_with_path(leave_out_large, target)
    restore_args = ocp.checkpoint_utils.construct_restore_args(small)
    args = ocp.args.PyTreeRestore(item=small, restore_args=restore_args, partial_restore=True)
    # By the handler itself: a `Checkpointer` would wait for other processes, which may fail or not be here.
    small = handler.restore(path, args=args)
    handler.close()
    # Orbax leaves the host buffers that it read into in reference cycles; they cannot wait there.
    gc.collect()

    def filled(key: Any, _: Any, restored: jax.Array | None) -> jax.Array:
        if restored is not None:
            return restored
        name = array_name(key)
        change = functools.partial(put_back, shape=large[name].shape, undo=undo.read(name))
        return read_large_array(directory / "state", name, large[name], change)

    return jax.tree_util.tree_map_with_path(filled, target, small)


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Left without one, Orbax takes the sharding of the run that saved, which this machine may not have.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same_tree(directory: Path, saved_tree: PyTree, wanted_tree: PyTree, partial: bool) -> None:
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


def _entries(tree: PyTree) -> dict[str, str]:
    """Dotted names of the leaves, with dtype and shape: {"params.w": "float32[3,4]"}."""
    return {
        ".".join(map(str, path)): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in ocp.tree.to_flat_dict(tree).items()
    }


def require_same_model(directory: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses a checkpoint whose model, or tokenizer, is not that of this run.

    Args:
        directory: of the checkpoint.
        there: its configuration.
        here: that of this run, from `ultramem_jax.config.to_dict`.

    Raises:
        UserError: with the fields that differ.
    """
    here = json.loads(json.dumps(here))  # as the checkpoint's own: tuples become lists
    differences = _differences("model", *(_wherever_it_lies(config.get("model")) for config in (there, here)))
    tokenizers = [config.get("data", {}).get("tokenizer") for config in (there, here)]
    differences += _differences("data.tokenizer", *tokenizers)
    if differences:
        raise UserError(f"checkpoint at {directory} is of another model: {_listed(differences)}")


def _wherever_it_lies(model: Any) -> Any:
    """A model's configuration without what says where its tables lie, which a run may change.

    Fields that a memory did not have when the checkpoint was written are as by default.
    """
    if not isinstance(model, dict) or not isinstance(model.get("memory"), dict):
        return model
    memory = dataclasses.asdict(MemoryConfig()) | model["memory"]
    del memory["memory_kind"], memory["partition"]
    return model | {"memory": memory}


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """One clause for each field below `name` in which two configurations differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        fields = [*there, *(field for field in here if field not in there)]
        return [
            clause
            for field in fields
            for clause in _differences(f"{name}.{field}", there.get(field), here.get(field))
        ]
    if there == here:
        return []
    shown = ["given" if isinstance(value, dict) else repr(value) for value in (there, here)]
    return [f"{name} is {shown[0]} there and {shown[1]} here"]


def _listed(clauses: list[str]) -> str:
    more = len(clauses) - _MESSAGE_ENTRIES
    return "; ".join(clauses[:_MESSAGE_ENTRIES]) + (f"; and {more} more" if more > 0 else "")
