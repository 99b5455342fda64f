"""Turns the authors' hyper-parameters into a `MemoryConfig`."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ultramem_jax.config.memory import MemoryConfig, MemorySite
from ultramem_jax.errors import UserError, choice, guards_a_denominator, require
from ultramem_jax.interop.hyper_values import Hyper, integer, number, of_hyper, switch, value
from ultramem_jax.layers.memory.product_keys import ProductKeys
from ultramem_jax.presets import families
from ultramem_jax.tree_types import JsonDict

LAYERS = ("v1", "v2", "memory_plus", "engram")
_NORM_EPS = 1e-5
"""Default epsilon of OLMo, which the authors' code is built on, and of `ModelConfig`."""
_MOST_PARTS = 1024
"""Bounds layers, and Tucker cores of a layer: the state dict has separate arrays for each."""


@dataclass(frozen=True)
class Reference:
    """Describes the layers of one state dict."""

    layer: str
    """Kind of layer. `v1` is one UltraMem layer with its own table; `v2` and `memory_plus` are layers over
    one table."""
    config: MemoryConfig
    num_layers: int
    """Number of layers in the state dict."""
    num_memories: int
    """M, the number of layers that the table is made for. It exceeds `num_layers` if the state holds only the
    first of them."""
    embed_dim: int
    """D, the width of the residual stream."""
    norm_eps: float
    """Epsilon of the RMS norms."""

    @functools.cached_property
    def sites(self) -> tuple[MemorySite, ...]:
        """Returns the memories that the table is made for, as if they were those of a model."""
        return tuple(
            MemorySite.alone(
                self.config,
                self.embed_dim,
                index=index,
                num_memories=self.num_memories,
                norm_eps=self.norm_eps,
            )
            for index in range(self.num_memories)
        )

    @property
    def address(self) -> ProductKeys:
        """Returns the config of the addresser, which finds rows by product keys."""
        assert isinstance(self.config.address, ProductKeys)
        return self.config.address

    @property
    def stacked(self) -> bool:
        """Tells whether arrays of tokens have a leading axis of layers."""
        return self.layer != "v1"

    def prefix(self, index: int) -> str:
        """Returns the prefix of the names of layer `index`."""
        return f"mem_blocks.{index}." if self.stacked else ""

    @property
    def table_prefix(self) -> str:
        """Returns the prefix of the names of the tables."""
        return "full_memory_layer." if self.stacked else ""

    @classmethod
    def of(cls, hyper: Hyper) -> "Reference":
        """Reads the hyper-parameters. Those that follow from others, and unknown ones, are ignored.

        Required are `layer` ("v1", "v2" or "memory_plus"), `hidden_size` (D), `knum` (n), `kdim` (d_k),
        `vdim` (d_v), `knn` (m) and `head` (H). V1 and V2 also require `tucker_rank` (r), `tucker_multihead`
        (h) and `value_expand_time` (V1: E; V2: 1 where the blocks are summed, else E). V2 and Memory+ require
        `layers` (those in the state dict). V2 requires `pre_vdim` (d_p), `key_expand_time` (√E),
        `share_ratio`, `use_glu_act`, `q_for_each_tucker_rank` and `key_balance_reg_coef`.

        Optional are `norm_eps` (1e-5), `norm` and `norm_affine` (only "rms" and true are known). V2 may also
        have `mem_layer_num`, the number of layers that the table is made for, where the state dict holds only
        the first of them. Its default is `layers`.

        Raises:
            UserError: `hyper` is no mapping; a field is missing, or has a value that the layer cannot have,
                or one that no machine can hold.
        """
        if not isinstance(hyper, Mapping):
            raise UserError(
                f"hyper: must be a dict of the authors' hyper-parameters, not a {type(hyper).__name__}"
            )
        layer = value(hyper, "layer")
        choice("hyper.layer", str(layer), LAYERS)
        # A state dict can only come from a layer with RMS norms that have a gain.
        norm = hyper.get("norm", "rms")
        require(isinstance(norm, str) and norm == "rms", "hyper.norm", norm, "must be 'rms'")
        affine = hyper.get("norm_affine", True)
        require(affine is True, "hyper.norm_affine", affine, "must be true: the norms have gains")
        fields: JsonDict = dict(
            num_keys=integer(hyper, "knum"),
            key_dim=integer(hyper, "kdim"),
            value_dim=integer(hyper, "vdim"),
            top_m=integer(hyper, "knn"),
            num_heads=integer(hyper, "head"),
            # The initial values do not matter here, and this way to draw them costs nothing.
            init="reference",
        )
        num_layers = num_memories = 1 if layer == "v1" else integer(hyper, "layers", high=_MOST_PARTS)
        if layer == "memory_plus":
            # The authors' release computes the norm of the keys and scores with the plain keys.
            config = of_hyper(lambda: families.memory_plus(norm_keys=False, **fields))
        else:
            fields |= dict(
                tucker_rank=integer(hyper, "tucker_rank"),
                num_cores=integer(hyper, "tucker_multihead", high=_MOST_PARTS),
                rank_keys="full",
                shuffle="explicit",
                core_loss_weight=0.0,
                query_conv_width=0,
            )
            fields |= _v1_fields(hyper) if layer == "v1" else _v2_fields(hyper)
            config = of_hyper(lambda: families.ultramem(**fields))
        if layer == "v2" and hyper.get("mem_layer_num") is not None:
            num_memories = integer(hyper, "mem_layer_num", low=num_layers, high=_MOST_PARTS)
        embed_dim, norm_eps = (
            integer(hyper, "hidden_size"),
            number({"norm_eps": _NORM_EPS} | dict(hyper), "norm_eps"),
        )
        guards_a_denominator("hyper.norm_eps", norm_eps)
        reference = cls(layer, config, num_layers, num_memories, embed_dim, norm_eps)
        of_hyper(lambda: reference.sites)  # raises where table and reads do not fit each other
        return reference


def _v1_fields(hyper: Hyper) -> JsonDict:
    expansion = integer(hyper, "value_expand_time")
    square = math.isqrt(expansion) ** 2 == expansion
    require(square, "hyper.value_expand_time", expansion, "must be a square: 1, 4, 9, 16, ...")
    return dict(expansion=expansion)


def _v2_fields(hyper: Hyper) -> JsonDict:
    expansion = integer(hyper, "key_expand_time") ** 2
    blocks = integer(hyper, "value_expand_time")
    require(
        blocks in (1, expansion),
        "hyper.value_expand_time",
        blocks,
        f"must be 1 or the square of key_expand_time, {expansion}",
    )
    pre_value_dim = integer(hyper, "pre_vdim", low=0)
    gelu = switch(hyper, "use_glu_act") and pre_value_dim > 0  # it acts on the products with pre-values
    return dict(
        expansion=expansion,
        sum_blocks=blocks == 1,
        pre_value_dim=pre_value_dim,
        pre_value_activation="gelu" if gelu else "none",
        query_per_rank=switch(hyper, "q_for_each_tucker_rank"),
        balance_loss_weight=number(hyper, "key_balance_reg_coef"),
        sharing="ring",
        share_ratio=number(hyper, "share_ratio"),
    )
