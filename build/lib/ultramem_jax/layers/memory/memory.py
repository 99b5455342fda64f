"""Applies a memory: its addresser, its table and its readout, one after the other."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers.caching import Chunk
from ultramem_jax.layers.memory.table import Table, Tables, declare_tables
from ultramem_jax.layers.sowing import sow


class SharedTables(nn.Module):
    """Holds the table that all memories of a config share, in its collection `memory`."""

    site: MemorySite
    """Site of any of these memories."""

    @nn.compact
    def __call__(self) -> Tables:
        """Returns the shared arrays: `values` and, if slots are experts, `pre_values`."""
        return declare_tables(self, self.site)


class Memory(nn.Module):
    """Reads R of a table's N rows for every token; maps (x, *, train) to y like every layer.

    Collections besides `params`:
        memory: `values` (N, d_v) and `pre_values` (N, d_p), unless the caller gives the tables.
        buffers: what the addresser keeps and is not trained.
        reads (sown): `slots` and `blocks` (T, R), the rows read and the blocks they are summed into;
            `weights` (T, R, h), with which they are summed; with pre-values also `inputs` (T, d_p).
        perturbations: `pooled` (T, blocks, d_v) and, with pre-values, `products` (T, R), whose gradients are
            the cotangents of the pooled reads and of the products.
            On a mesh, perturbations and reads are those that `ultramem_jax.ops.sharded_lookup` has at the
            owners of the tables.
        losses, metrics (sown): auxiliary losses; scores, output and others.
    """

    site: MemorySite

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        token_ids: jax.Array | None = None,
        tables: Tables | None = None,
        chunk: Chunk | None = None,
    ) -> jax.Array:
        """Maps x (B, S, D) to (B, S, D), by reading the memory for every token.

        Args:
            x: (B, S, D).
            train: unused, but part of the call that all layers share.
            token_ids: (B, S) int32, the tokens at these positions, for addressers that need them.
            tables: those of `SharedTables`; None if the layer has its own.
            chunk: if given, x continues what is in the collection `cache`, which must be mutable.

        Returns:
            (B, S, D) in the computation's dtype.
        """
        del train
        site = self.site
        x = x.astype(site.context.dtype)
        addresser = site.config.address.addresser(site, name="address")
        table = Table(site, name="table")
        readout = site.config.readout.readout(site, name="readout")
        for part in (addresser, table, readout):
            nn.share_scope(self, part)
        reads = addresser(x, token_ids, chunk)
        pooled = table(reads, x.reshape(-1, x.shape[2]), tables)
        y = readout(pooled, x, chunk)
        sow(self, "metrics", "output_std", jnp.std(y.astype(jnp.float32)))
        return y
