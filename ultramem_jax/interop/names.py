"""Lists the entries of the authors' state dicts of single layers, with the layouts of their variables.

The authors keep linear maps as (out, in), keys with their heads first and ranks last, and every Tucker core
as a separate array.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from ultramem_jax.errors import require
from ultramem_jax.interop.entries import Entry, transposed
from ultramem_jax.interop.hyper import Reference

TABLES = "tables"
"""Name of the module that holds the tables."""
_MOST_NUMBERS = 2**48
"""Bounds the size of an array: a petabyte in float32. At larger shapes NumPy would fail with its own
errors."""


def entries(reference: Reference) -> list[Entry]:
    """Returns all entries, in the order of the layers; the tables come last.

    Raises:
        UserError: an array would have more numbers than any machine holds.
    """
    config = reference.config
    found = [entry for index in range(reference.num_layers) for entry in _layer_entries(reference, index)]
    slots = reference.sites[0].num_slots
    for name, width in config.table.arrays.items():
        if width:
            names = (f"{reference.table_prefix}{name}_for_look_up",)
            found.append(Entry(("memory", TABLES, name), names, (slots, width)))
    for entry in found:
        fits = math.prod(entry.shape) <= _MOST_NUMBERS
        require(
            fits, f"hyper amounts to {entry.names[0]}.shape", entry.shape, "must be of at most 2**48 numbers"
        )
    return found


def _layer_entries(reference: Reference, index: int) -> list[Entry]:
    config, layer = reference.config, _Layer(reference, index)
    gain = (reference.address.key_dim,)
    found = [
        layer.entry("query_scale", "query_norm.weight", gain),
        # Memory+ does not use this scale, and the layer does not declare it. It is kept for `dump`.
        layer.entry("key_scale", "keys_norm.weight", gain),
        layer.linear(
            "projection",
            "values_proj.weight",
            reference.embed_dim,
            config.num_blocks * config.table.value_dim,
        ),
    ]
    own = _memory_plus_entries if reference.layer == "memory_plus" else _ultramem_entries
    return found + own(layer)


@dataclass(frozen=True)
class _Layer:
    """Makes the entries of one layer."""

    reference: Reference
    index: int

    def entry(
        self,
        name: str,
        reference_name: str,
        shape: tuple[int, ...],
        *,
        collection: str = "params",
        **how: Any,
    ) -> Entry:
        """Returns the entry of the variable `name` of the layer; `how` are fields of `Entry`."""
        names = (self.reference.prefix(self.index) + reference_name,)
        return Entry((collection, self.reference.sites[self.index].name, name), names, shape, **how)

    def linear(self, name: str, reference_name: str, width_out: int, width_in: int) -> Entry:
        """Returns the entry of a linear map without bias."""
        shape = (width_out, width_in)
        return self.entry(name, reference_name, shape, to_variable=transposed, to_state=transposed)


def _memory_plus_entries(layer: _Layer) -> list[Entry]:
    reference, table = layer.reference, layer.reference.config.table
    address, embed_dim = reference.address, reference.embed_dim
    heads, d_k = address.num_heads, address.key_dim
    num_keys = reference.sites[0].parameters["keys"].shape[3]
    return [
        layer.linear("gate", "swilu_projection.weight", table.value_dim, embed_dim),
        layer.entry(
            "query",
            "query_proj.weight",
            (2 * heads * d_k, embed_dim),
            # Rows (head, side, d_k) to columns (side, head, d_k).
            to_variable=lambda w: w.reshape(heads, 2, d_k, -1).transpose(3, 1, 0, 2).reshape(-1, w.shape[0]),
            to_state=lambda w: w.reshape(-1, 2, heads, d_k).transpose(2, 1, 3, 0).reshape(-1, w.shape[0]),
        ),
        layer.entry(
            "keys",
            "keys",
            (heads, 2, num_keys, d_k),
            to_variable=lambda keys: keys.swapaxes(0, 1)[:, :, None],  # to (side, head, 1, K, d_k)
            to_state=lambda keys: keys[:, :, 0].swapaxes(0, 1),
        ),
    ]


def _ultramem_entries(layer: _Layer) -> list[Entry]:
    """Returns the entries of UltraMem and UltraMemV2 layers."""
    reference, table = layer.reference, layer.reference.config.table
    address, embed_dim = reference.address, reference.embed_dim
    heads, ranks, d_k = address.num_heads, address.num_ranks, address.key_dim
    num_keys = reference.sites[0].parameters["keys"].shape[3]
    cores = layer.entry("cores", "tucker_core", (heads, ranks, ranks))
    found = [
        # Rows (side, d_k), or (side, rank, d_k): the order of the layer's columns.
        layer.linear("query", "query_proj.weight", 2 * address.num_queries * d_k, embed_dim),
        layer.entry(
            "keys",
            "keys",
            (heads, 2, num_keys, d_k, ranks),
            to_variable=lambda keys: keys.transpose(1, 0, 4, 2, 3),  # to (side, head, rank, K, d_k)
            to_state=lambda keys: keys.transpose(1, 0, 3, 4, 2),
        ),
        replace(cores, names=tuple(f"{cores.names[0]}.{i}" for i in range(address.num_cores)), axis=1),
        layer.entry(
            "permutation", "shuffle_index", (num_keys**2,), collection="buffers", constant=True, index=True
        ),
    ]
    for name, reference_name in (("row_direction", "tucker_core_u"), ("column_direction", "tucker_core_v")):
        found.append(
            layer.entry(
                name,
                reference_name,
                (1, heads, 1, ranks),
                collection="buffers",
                to_variable=lambda vector: vector[0, :, 0],
                to_state=lambda vector: vector[None, :, None],
            )
        )
    if table.pre_value_dim:
        found.append(layer.linear("pre_projection", "pre_values_proj.weight", table.pre_value_dim, embed_dim))
    return found
