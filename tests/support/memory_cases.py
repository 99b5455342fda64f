"""Makes memories with random variables, and compares them with their definition."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tests.support import oracle
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers import Memory, SharedTables
from ultramem_jax.ops import addressing


class Case(NamedTuple):
    """Holds a memory, its variables and its inputs."""

    module: Memory
    variables: dict
    x: jax.Array
    tables: dict | None
    """Tables of the model, if its memories share one."""

    def run(self):
        """Returns the output, compiled as one program."""
        apply = jax.jit(lambda *args: self.module.apply(*args[:2], train=False, tables=args[2]))
        return apply(self.variables, self.x, self.tables)

    def expected(self):
        """Returns the same in float64, from the definition."""
        x = np.asarray(self.x, np.float64)
        return oracle.memory_layer(self.module.site.config, self.variables, x, self.cell(), self.tables)

    def cell(self):
        """Returns (row, column) -> (block, row of the table)."""
        return addressing_of(self.module, self.variables)


def layer(config, embed_dim, **context):
    """Returns a memory by itself, as in a model of four layers."""
    return Memory(MemorySite.alone(config, embed_dim, **dict(num_layers=4) | context))


def case(config, num_memories=2, index=1, seed=0, embed_dim=16):
    """Returns a memory in a model of several, with variables of no special values, and x (2, 5, D)."""
    module = layer(config, embed_dim, index=index, num_memories=num_memories)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, 5, embed_dim)), jnp.float32)

    def draw(path, a):
        name = path[-1].key
        if name == "permutation":
            return jnp.asarray(rng.permutation(len(a)), jnp.int32)
        if name in ("cores", "query_scale", "key_scale", "query_conv"):
            return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), jnp.float32)
        return jnp.asarray(rng.normal(size=a.shape) * 0.4, jnp.float32)

    key, tables = jax.random.key(0), None
    if config.table.is_shared:
        shared = SharedTables(module.site)
        tables, _ = jax.eval_shape(lambda: shared.init_with_output(key))
        tables = jax.tree.map_with_path(draw, tables)
    # Only shapes: to run the initialisation takes as long as to compile the layer.
    made = jax.eval_shape(lambda: module.init(key, x, train=False, tables=tables))
    return Case(module, jax.tree.map_with_path(draw, dict(made)), x, tables)


def addressing_of(module, variables):
    """Returns (row, column) -> (block, row of the table) as the layer has it, each part tested on its own."""
    site, config = module.site, module.site.config.address
    keys, size = config.window_keys(site), config.num_virtual_keys(site)
    cells = (jnp.asarray(a, jnp.int32) for a in np.divmod(np.arange(size * size), size))
    if config.shuffle == "explicit":
        address = np.asarray(variables["buffers"]["permutation"])
        blocks, slots = np.divmod(address, keys * keys)
    elif config.shuffle == "none" or (config.expansion == 1 and not site.config.table.is_shared):
        blocks, slots = addressing.block_and_slot(*cells, keys, config.expansion)
    else:
        shuffled = jax.jit(addressing.shuffled_block_and_slot, static_argnums=(2, 3, 4))
        blocks, slots = shuffled(*cells, keys, config.expansion, config.shuffle_seed + site.index)
    blocks, slots = np.asarray(blocks), np.asarray(slots)
    offset, rows = site.window.first, site.num_slots
    return lambda i, j: (int(blocks[i * size + j]), (int(slots[i * size + j]) + offset) % rows)


def assert_close_to_float64(found, expected):
    """Asserts that float32 differs from float64 by 1e-4 of an entry and 1e-5 of the entries' scatter."""
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5 * expected.std())
