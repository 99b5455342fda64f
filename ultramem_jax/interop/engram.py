"""Describes the Engram layer of the released demo (arXiv 2601.07372): its hyper-parameters and state dict.

The layer has one residual stream, so only the first entry of each list over streams is used. The tables of
all heads lie one after the other in one embedding, orders first, then heads, as they do here. The demo keeps
the convolution's taps in the order of the sequence, and this project by how far they look back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ultramem_jax.config.memory import MemoryConfig, MemorySite, memory_of
from ultramem_jax.config.memory_parts import ModelContext
from ultramem_jax.config.placement import Span
from ultramem_jax.errors import guards_a_denominator, require
from ultramem_jax.interop.entries import Entry, transposed
from ultramem_jax.interop.hyper_values import Hyper, integer, number, of_hyper, value

MODULE = "memory_0"
"""Name of the layer in trees of variables."""
_CONV_EPS = 1e-5
_MOST_LAYERS = 1024
_MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class EngramReference:
    """Describes the layer of one state dict."""

    config: MemoryConfig
    site: MemorySite
    """The layer among the model's layers. Its primes follow on those of earlier layers."""

    @property
    def embed_dim(self) -> int:
        """Returns D, the width of the residual stream."""
        return self.site.context.embed_dim

    @classmethod
    def of(cls, hyper: Hyper) -> "EngramReference":
        """Reads the hyper-parameters under the demo's names. Unknown ones are ignored.

        Required are `hidden_size` (D), `n_embed_per_ngram` (d_e of an order, all heads together),
        `n_head_per_ngram` (K), `max_ngram_size` (n_max), `kernel_size`, `engram_vocab_size` (requested rows
        of a head's table, one number for each order from 2), `layer_ids` (all Engram layers of the model, in
        their order), `layer_id` (which of these it is), `pad_id` (a token), `seed`, `vocab_size` (V) and
        `canonical_vocab_size` (V_c).

        Optional are `hc_mult` (only 1 is known) and `norm_eps`, {"gate": None or a number, "conv": a number}.
        Without a number, `gate` is the machine epsilon of float32, and `conv` is 1e-5.

        Raises:
            UserError: a field is missing, or has a value that the layer cannot have.
        """
        order, heads = integer(hyper, "max_ngram_size", low=2), integer(hyper, "n_head_per_ngram")
        width = integer(hyper, "n_embed_per_ngram")
        require(
            width % heads == 0, "hyper.n_embed_per_ngram", width, f"must be a multiple of the {heads} heads"
        )
        require(hyper.get("hc_mult", 1) == 1, "hyper.hc_mult", hyper.get("hc_mult"), "must be 1: one stream")
        rows = _integers(hyper, "engram_vocab_size", low=1)
        require(
            len(rows) == order - 1,
            "hyper.engram_vocab_size",
            list(rows),
            f"must have one number for each order from 2 to max_ngram_size = {order}",
        )
        layers, layer = _integers(hyper, "layer_ids", low=0), integer(hyper, "layer_id", low=0)
        require(layer in layers, "hyper.layer_id", layer, f"must be one of layer_ids = {list(layers)}")
        distinct = len(set(layers)) == len(layers) <= _MOST_LAYERS
        require(distinct, "hyper.layer_ids", list(layers), f"must be at most {_MOST_LAYERS} different layers")
        vocab, canonical = integer(hyper, "vocab_size"), integer(hyper, "canonical_vocab_size")
        allowed = f"must be at most vocab_size = {vocab}"
        require(canonical <= vocab, "hyper.canonical_vocab_size", canonical, allowed)
        gate_eps, conv_eps = _epsilons(hyper)
        taps = integer(hyper, "kernel_size")
        seed = integer(hyper, "seed", low=0, high=_MOST_SEED, why="seeds have 32 bits")
        pad = integer(hyper, "pad_id", low=0)

        def make() -> MemoryConfig:
            return memory_of(
                "hashed_ngrams",
                "context_gate",
                max_order=order,
                heads_per_order=heads,
                rows_per_head=rows,
                num_canonical_ids=canonical,
                pad_id=pad,
                seed=seed,
                value_dim=width // heads,
                conv_width=taps,
                conv_dilation=order,
                gate_norm_eps=gate_eps,
            )

        config = of_hyper(make)
        context = ModelContext(
            embed_dim=integer(hyper, "hidden_size"),
            num_layers=len(layers),
            vocab_size=vocab,
            inner_ratio=4.0,
            dtype="float32",
            norm_eps=conv_eps,
            starts=layers,
        )
        layout = of_hyper(lambda: config.address.layout(config, context))
        site = MemorySite(
            "memory", layers.index(layer), Span(layer, layer, "before"), config, context, layout
        )
        return cls(config, site)

    def entries(self) -> list[Entry]:
        """Returns which entry of the state dict is which variable."""
        d = self.embed_dim
        width = self.config.num_blocks * self.config.table.value_dim

        def entry(name: str, theirs: str, shape: tuple[int, ...], **how: Any) -> Entry:
            return Entry(("params", MODULE, name), (theirs,), shape, **how)

        found = []
        for name, theirs in (("value", "value_proj"), ("key", "key_projs.0")):
            maps = dict(to_variable=transposed, to_state=transposed)
            found.append(entry(f"{name}_projection", f"{theirs}.weight", (d, width), **maps))
            found.append(entry(f"{name}_bias", f"{theirs}.bias", (d,)))
        found.append(entry("gate_key_scale", "norm1.0.weight", (d,)))
        found.append(entry("gate_hidden_scale", "norm2.0.weight", (d,)))
        taps = self.config.value_of("conv_width")
        conv = entry("conv", "short_conv.conv.weight", (d, 1, taps), to_variable=_taps, to_state=_kernel)
        found += [conv, entry("conv_scale", "short_conv.norms.0.weight", (d,))]
        rows = (self.site.num_slots, self.config.table.value_dim)
        table = entry("values", "multi_head_embedding.embedding.weight", rows)
        found.append(replace(table, path=("memory", MODULE, "values")))
        tokens = Entry(
            ("buffers", MODULE, "canonical_ids"),
            ("lookup_table",),
            (self.site.context.vocab_size,),
            constant=True,
            index=True,
            limit=self.config.value_of("num_canonical_ids"),
        )
        return [*found, tokens]


def _epsilons(hyper: Hyper) -> tuple[float, float]:
    """Returns the epsilon of the gate's norms, and that of the convolution's norm.

    0 stands for the machine epsilon of float32.
    """
    eps = hyper.get("norm_eps") or {}
    require(isinstance(eps, Mapping), "hyper.norm_eps", eps, "must be a dict of 'gate' and 'conv'")
    gate_eps = 0.0
    if eps.get("gate") is not None:
        gate_eps = number(eps, "gate", "norm_eps.")
        guards_a_denominator("hyper.norm_eps.gate", gate_eps)
    conv_eps = _CONV_EPS if eps.get("conv") is None else number(eps, "conv", "norm_eps.")
    guards_a_denominator("hyper.norm_eps.conv", conv_eps)
    return gate_eps, conv_eps


def _taps(kernel: np.ndarray) -> np.ndarray:
    """Turns (D, 1, width) in the order of the sequence into (width, D) by how far a tap looks back."""
    return kernel[:, 0].T[::-1]


def _kernel(taps: np.ndarray) -> np.ndarray:
    return taps[::-1].T[:, None]


def _integers(hyper: Hyper, name: str, low: int) -> tuple[int, ...]:
    found = value(hyper, name)
    listed = isinstance(found, Sequence | np.ndarray) and not isinstance(found, str) and len(found) > 0
    require(listed, f"hyper.{name}", found, "must be a list of integers")
    return tuple(integer({name: one}, name, low) for one in found)
