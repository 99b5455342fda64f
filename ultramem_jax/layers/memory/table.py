"""Declares and looks up the rows that memories read: values and, if slots are experts, pre-values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers.memory.addresser import Reads
from ultramem_jax.layers.parameters import matrix
from ultramem_jax.layers.sowing import sow
from ultramem_jax.ops import sharded_lookup
from ultramem_jax.ops.linear import project
from ultramem_jax.ops.on_mesh import current_axes, island
from ultramem_jax.ops.rows import stored_dtype, to_stored
from ultramem_jax.ops.sharded_lookup import first_slot

Tables = dict[str, jax.Array]
"""Arrays `values` (N, d_v) and, if d_p > 0, `pre_values` (N, d_p), as `ultramem_jax.ops.rows` stores them."""

_BLOCK_VALUES = 1 << 20
"""Number of values of a table that are drawn at a time."""


def declare_tables(module: nn.Module, site: MemorySite) -> Tables:
    """Declares the table of a memory in the module's collection `memory`.

    It is not in `params`, because tables are trained by rows.
    """
    config, tables = site.config.table, {}
    for name, width in config.arrays.items():
        # The lambda has default arguments, because the loop may change the variables before it is called.
        draw = lambda name=name, width=width: draw_table(  # noqa: E731
            module.make_rng("params"),
            site.num_slots,
            width,
            getattr(site.initial, f"{name}_std"),
            config.dtype,
        )
        tables[name] = jnp.asarray(module.variable("memory", name, draw).value)
    return tables


class Table(nn.Module):
    """Looks up the rows of reads, pools them to (T, E, d_v), and records what row updates need."""

    site: MemorySite

    @nn.compact
    def __call__(self, reads: Reads, x: jax.Array, tables: Tables | None) -> jax.Array:
        """Looks up the rows of reads and pools them to (T, E, d_v).

        Args:
            reads: the reads of every token.
            x: (T, D), with which pre-values are multiplied.
            tables: those that memories share; None for the memory's own.

        Returns:
            The pooled sums, (T, E, d_v).
        """
        config, num_blocks = self.site.config, self.site.config.num_blocks
        blocks = jnp.zeros_like(reads.blocks) if config.readout.sums_blocks else reads.blocks
        slots, blocks = sharded_lookup.reads_at_owners(reads.slots, blocks, num_blocks)
        sow(self, "reads", "slots", slots)
        sow(self, "reads", "blocks", blocks)
        if tables is None:
            tables = declare_tables(self, self.site)
        if self.has_variable("prefetched", "values"):
            # The row of every read is here already, in the order of the reads.
            tables = {"values": jnp.asarray(self.get_variable("prefetched", "values"))}
            slots = jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
        weights = reads.weights
        if config.table.pre_value_dim:
            weights = weights * self._activations(tables["pre_values"], slots, x)[..., None]
        return self._pooled(tables["values"], slots, blocks, weights)

    def _pooled(
        self, values: jax.Array, slots: jax.Array, blocks: jax.Array, weights: jax.Array
    ) -> jax.Array:
        config = self.site.config
        sums, weights = sharded_lookup.pooled_at_owners(
            values, slots, blocks, weights, config.num_blocks, config.reads_apart
        )
        sow(self, "reads", "weights", weights)
        return sharded_lookup.pooled_at_tokens(self._perturbed("pooled", sums))

    def _activations(self, pre_values: jax.Array, slots: jax.Array, x: jax.Array) -> jax.Array:
        """Returns (T, R), act(u·p) of every slot read: u is its pre-value, p the token's projection of x."""
        config = self.site.config.table
        if config.project_pre_values:
            shape = (x.shape[-1], config.pre_value_dim)
            init = self.site.initial.input or nn.initializers.lecun_normal()
            x = project(x, matrix(self, "pre_projection", init, shape))
        sums, inputs = sharded_lookup.products_at_owners(pre_values, slots, x)
        sow(self, "reads", "inputs", inputs)
        products = sharded_lookup.products_at_tokens(self._perturbed("products", sums))
        return nn.gelu(products, approximate=False) if config.pre_value_activation == "gelu" else products

    def _perturbed(self, name: str, value: jax.Array) -> jax.Array:
        # A perturbation has the shape of a batch, so it belongs to the training step: initialisation must not
        # make it a variable of the layer. A step has none for a table that does not learn.
        return self.perturb(name, value) if self.has_variable("perturbations", name) else value


def draw_table(key: jax.Array, num_slots: int, width: int, std: float, dtype: str = "float32") -> jax.Array:
    """Draws a table (N, width) from N(0, std²), part by part, as `ultramem_jax.ops.rows` stores `dtype`.

    The generator's bits take several times the bytes of what is drawn, so only one part is drawn at a time.
    """
    rows = min(max(_BLOCK_VALUES // width, 1), num_slots)
    stored = stored_dtype(dtype)

    def block_of(key: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns a part's first row, and the part; the last part starts early enough to fit in."""
        start = jnp.minimum(block * rows, num_slots - rows)
        drawn = std * jax.random.normal(jax.random.fold_in(key, block), (rows, width), jnp.float32)
        return start, to_stored(drawn, stored)

    def draw_all(key: jax.Array) -> jax.Array:
        def fill(block: jax.Array, table: jax.Array) -> jax.Array:
            start, drawn = block_of(key, block)
            return jax.lax.dynamic_update_slice(table, drawn, (start, 0))

        return jax.lax.fori_loop(0, -(-num_slots // rows), fill, jnp.zeros((num_slots, width), stored))

    def draw_part(key: jax.Array) -> jax.Array:
        """Draws the rows and columns of the same table that a device owns.

        Parts have whole rows. So devices that own columns all draw the same parts, and keep their columns.
        """
        assert axes is not None
        own_rows, own_width = num_slots // axes.size(axes.slots), width // axes.size(axes.width)
        first = first_slot(axes, own_rows)
        column = jax.lax.axis_index(axes.width) * own_width if axes.width else 0

        def fill(block: jax.Array, table: jax.Array) -> jax.Array:
            start, drawn = block_of(key, block)
            place = start - first + jnp.arange(rows, dtype=jnp.int32)
            place = jnp.where(place < 0, own_rows, place)  # a negative index would count from the end
            own = jax.lax.dynamic_slice_in_dim(drawn, column, own_width, 1)
            return table.at[place].set(own, mode="drop", unique_indices=False, indices_are_sorted=False)

        last = jnp.minimum((first + own_rows - 1) // rows + 1, -(-num_slots // rows) - 1)
        return jax.lax.fori_loop(first // rows, last + 1, fill, jnp.zeros((own_rows, own_width), stored))

    axes = current_axes()
    return draw_all(key) if axes is None else island(axes, draw_part, P(), axes.table)(key)
