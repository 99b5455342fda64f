"""Which entry of the authors' state dict is which variable of this project, and in which layout.

The authors keep linear maps as (out, in), keys with their heads first and ranks last, and every Tucker core
as an array of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ultramem_jax.interop.hyper import Reference

Path = tuple[str, ...]
TABLES = "tables"
"""The module that holds the tables."""


def layer_name(index: int) -> str:
    """The module of layer `index`."""
    return f"memory_{index}"


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.T


@dataclass(frozen=True)
class Entry:
    """One variable and the array, or the arrays, of the state dict that it is made of."""

    path: Path
    """Collection, module and name of the variable."""
    names: tuple[str, ...]
    """One name; for `cores` one of each core, the second axis of the variable."""
    shape: tuple[int, ...]
    """Of the array under each name."""
    to_variable: Callable[[np.ndarray], np.ndarray] = _same
    to_state: Callable[[np.ndarray], np.ndarray] = _same
    """The inverse."""
    constant: bool = False
    """An integer array, kept as a `Constant` with its dtype."""

    def pack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The variable from the arrays under `names`, each of shape `shape`."""
        return np.stack(arrays, axis=1) if self._in_parts else self.to_variable(arrays[0])

    def unpack(self, variable: np.ndarray) -> list[np.ndarray]:
        """The inverse of `pack`."""
        parts = np.moveaxis(variable, 1, 0) if self._in_parts else [self.to_state(variable)]
        return [np.array(part, order="C") for part in parts]

    @property
    def variable_shape(self) -> tuple[int, ...]:
        """Shape of the variable."""
        # A view of a single number, which takes no memory whatever the shape.
        return self.pack([np.broadcast_to(np.float32(0), self.shape)] * len(self.names)).shape

    @property
    def _in_parts(self) -> bool:
        return self.path[-1] == "cores"


def entries(reference: Reference) -> list[Entry]:
    """All of them, in the order of the layers; the tables come last."""
    config = reference.config
    found = [entry for index in range(reference.num_layers) for entry in _layer_entries(reference, index)]
    slots = config.layout(reference.num_memories).num_slots
    for name, width in (("values", config.value_dim), ("pre_values", config.pre_value_dim)):
        if width:
            names = (f"{reference.table_prefix}{name}_for_look_up",)
            found.append(Entry(("memory", TABLES, name), names, (slots, width)))
    return found


def _layer_entries(reference: Reference, index: int) -> list[Entry]:
    config, embed_dim, prefix = reference.config, reference.embed_dim, reference.prefix(index)
    layout = config.layout(reference.num_memories)
    heads, ranks, d_k, num_keys = config.num_heads, config.num_ranks, config.key_dim, layout.num_virtual_keys

    def linear(name: str, width_out: int, width_in: int, reference_name: str) -> Entry:
        path, names = ("params", layer_name(index), name), (prefix + reference_name,)
        return Entry(path, names, (width_out, width_in), _transposed, _transposed)

    def gain(name: str, reference_name: str) -> Entry:
        return Entry(("params", layer_name(index), name), (prefix + reference_name,), (d_k,))

    blocks = config.num_blocks * config.value_dim
    found = [
        gain("query_scale", "query_norm.weight"),
        # Memory+ does not use it, and the layer does not declare it; kept so that it comes out again.
        gain("key_scale", "keys_norm.weight"),
        linear("projection", embed_dim, blocks, "values_proj.weight"),
    ]
    keys_path = ("params", layer_name(index), "keys")
    query_path = ("params", layer_name(index), "query")
    query_name, keys_name = (prefix + "query_proj.weight",), (prefix + "keys",)
    query_shape = (2 * config.num_queries * d_k, embed_dim)
    if config.gate:  # Memory+
        found += [
            linear("gate", config.value_dim, embed_dim, "swilu_projection.weight"),
            Entry(
                query_path,
                query_name,
                query_shape,
                # Rows (head, side, d_k) to columns (side, head, d_k).
                lambda w: w.reshape(heads, 2, d_k, -1).transpose(3, 1, 0, 2).reshape(-1, w.shape[0]),
                lambda w: w.reshape(-1, 2, heads, d_k).transpose(2, 1, 3, 0).reshape(-1, w.shape[0]),
            ),
            Entry(
                keys_path,
                keys_name,
                (heads, 2, num_keys, d_k),
                lambda keys: keys.swapaxes(0, 1)[:, :, None],  # to (side, head, 1, K, d_k)
                lambda keys: keys[:, :, 0].swapaxes(0, 1),
            ),
        ]
        return found
    found += [
        # Rows (side, d_k), or (side, rank, d_k): the order of the layer's columns.
        Entry(query_path, query_name, query_shape, _transposed, _transposed),
        Entry(
            keys_path,
            keys_name,
            (heads, 2, num_keys, d_k, ranks),
            lambda keys: keys.transpose(1, 0, 4, 2, 3),  # to (side, head, rank, K, d_k)
            lambda keys: keys.transpose(1, 0, 3, 4, 2),
        ),
        Entry(
            ("params", layer_name(index), "cores"),
            tuple(f"{prefix}tucker_core.{core}" for core in range(config.num_cores)),
            (heads, ranks, ranks),
        ),
        Entry(
            ("buffers", layer_name(index), "permutation"),
            (prefix + "shuffle_index",),
            (num_keys**2,),
            constant=True,
        ),
    ]
    for name, reference_name in (("row_direction", "tucker_core_u"), ("column_direction", "tucker_core_v")):
        found.append(
            Entry(
                ("buffers", layer_name(index), name),
                (prefix + reference_name,),
                (1, heads, 1, ranks),
                lambda vector: vector[0, :, 0],
                lambda vector: vector[None, :, None],
            )
        )
    if config.pre_value_dim:
        found.append(linear("pre_projection", config.pre_value_dim, embed_dim, "pre_values_proj.weight"))
    return found
