"""Configures the shape of a Transformer: its layers, its experts and its memories."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ultramem_jax.config.field_types import Checked, built_at
from ultramem_jax.config.frozen_mapping import FrozenMapping
from ultramem_jax.config.limits import LARGEST
from ultramem_jax.config.memory import MemoryConfig, MemorySite
from ultramem_jax.config.memory_parts import ModelContext
from ultramem_jax.config.placement import parse_placement
from ultramem_jax.errors import at_least, fraction, guards_a_denominator, require


@dataclass(frozen=True)
class MoEConfig(Checked):
    """Configures a Mixture of Experts that replaces the MLP of every layer, with dropless top-k routing."""

    PREFIX = "model.moe."

    num_experts: int = 32
    """X, experts of a layer."""
    top_k: int = 2
    """k, experts that a token visits."""
    expert_dim: int = 256
    """F, inner width of one expert."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Kind of the experts' MLPs: `gelu` (the UltraMem paper's baseline) or `swiglu` (OLMoE's)."""
    normalize_gates: bool = True
    """True if the k gates are divided by their sum (top-2 models); OLMoE keeps the values of the softmax."""
    load_balance_weight: float = 0.01
    """Weight of the loss X·Σ f_i·p_i (Switch Transformer, arXiv 2101.03961; OLMoE uses 0.01). f and p are
    those of a micro-batch, over all devices of a mesh. With `TrainConfig.grad_accumulation` the loss is the
    mean over the micro-batches, which differs slightly from the loss of the whole batch."""
    router_z_weight: float = 1e-3
    """Weight of the loss mean(logsumexp(router logits)²) (ST-MoE, arXiv 2202.08906)."""
    auxiliary_over_layers: Literal["sum", "mean"] = "sum"
    """Reduction of the two losses over all layers with experts: `sum` (Switch Transformer), or `mean`, as in
    OLMoE's code (arXiv 2409.02060), so that their weight does not grow with depth."""
    implementation: Literal["auto", "blocks", "groups", "ragged"] = "auto"
    """Implementation of the experts, see `layers.experts`. `blocks`: slots of every expert, and a loop over
    what is beyond. `groups`: padded groups of rows of one expert. `ragged`: a ragged product. `auto` takes
    the platform's: `blocks` on CPU, `ragged` on TPU and on GPU with tokamax, `groups` on GPU without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, model__moe__num_experts=self.num_experts, model__moe__top_k=self.top_k)
        require(
            self.num_experts < 2**31, "model.moe.num_experts", self.num_experts, "must be below 2**31: int32"
        )
        at_least(1, model__moe__expert_dim=self.expert_dim)
        at_least(0, model__moe__load_balance_weight=self.load_balance_weight)
        at_least(0, model__moe__router_z_weight=self.router_z_weight)
        require(
            self.top_k <= self.num_experts,
            "model.moe.top_k",
            self.top_k,
            f"must be at most num_experts = {self.num_experts}",
        )


@dataclass(frozen=True)
class RopeScalingConfig(Checked):
    """Configures how rotary frequencies are lowered, for contexts beyond those of pretraining (Llama 3.1).

    With the wavelength 2π/f of a frequency f, and N = `original_length`: frequencies of wavelengths above
    N / `low_freq_factor` are divided by `factor`, those below N / `high_freq_factor` stay, and those between
    are interpolated.
    """

    PREFIX = "model.rope_scaling."

    factor: float = 8.0
    """Divisor of the low frequencies."""
    low_freq_factor: float = 1.0
    """Turns in N positions, at most, of the frequencies that are divided."""
    high_freq_factor: float = 4.0
    """Turns in N positions, at least, of the frequencies that stay."""
    original_length: int = 8192
    """N, context length of pretraining, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "factor", "original_length")
        self.require(self.low_freq_factor > 0, "low_freq_factor", "must be above 0")
        allowed = f"must be above low_freq_factor = {self.low_freq_factor}"
        self.require(self.high_freq_factor > self.low_freq_factor, "high_freq_factor", allowed)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Configures a pre-norm decoder. `moe` replaces the MLPs and `memories` are added; both are optional."""

    PREFIX = "model."

    vocab_size: int = 257
    """V, size of the vocabulary. The default has all bytes and one end-of-document token; see
    `ultramem_jax.data.tokenizers`."""
    embed_dim: int = 128
    """D, width of the residual stream."""
    num_layers: int = 4
    """L, Transformer layers."""
    num_heads: int = 4
    """A, attention heads."""
    num_kv_heads: int = 4
    """Attention heads of keys and values; fewer than `num_heads` is grouped-query attention."""
    head_dim: int = 0
    """d, width of an attention head; 0 is D/A."""
    attention_qk_norm: Literal["none", "all_heads", "per_head"] = "none"
    """RMS norms with gain of queries and keys, before the rotation: `all_heads`, over those of all heads
    together (OLMoE, arXiv 2409.02060), or `per_head`, with one gain for all heads (Qwen3)."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of attention: on the projections to queries, keys and values (`qkv`, Qwen2), or on these and on
    the output projection (`all`)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Kind of the MLPs: `gelu` or `swiglu`."""
    mlp_dim: int = 512
    """F, inner width of the MLPs."""
    moe: MoEConfig | None = None
    """Experts that replace the MLPs, or None."""
    memories: Mapping[str, MemoryConfig] = field(default_factory=FrozenMapping)
    """Memories by name. A model may combine several kinds; each name has its own places and tables. Metrics
    and parameters of memory `index` of a name are called `name_index`."""
    tie_embeddings: bool = True
    """True if the output projection is the transposed embedding."""
    dropout: float = 0.0
    """Probability of dropout after the embedding, attention, the feed-forward and the memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation, `float32` or `bfloat16`. Dense parameters and experts are always float32;
    `TableConfig.dtype` sets the dtype of tables."""
    scan_layers: bool = False
    """Whether equal layers between memories are one scan in training, so that the time to compile does not
    grow with depth. Parameters and checkpoints are the same; only dropout draws other numbers."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies (RoFormer, arXiv 2104.09864)."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of the rotary frequencies, or None."""
    max_length: int = 0
    """Longest context in tokens that the model was made for; 0 is unknown. Generation and evaluation of an
    open model go no further; training does not ask."""
    norm_eps: float = 1e-5
    """Epsilon of RMS norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, model__vocab_size=self.vocab_size, model__embed_dim=self.embed_dim)
        at_least(1, model__num_layers=self.num_layers, model__num_heads=self.num_heads)
        at_least(1, model__num_kv_heads=self.num_kv_heads, model__mlp_dim=self.mlp_dim)
        fraction(model__dropout=self.dropout)
        require(
            1 < self.rope_theta <= 1e12, "model.rope_theta", self.rope_theta, "must be above 1, at most 1e12"
        )
        guards_a_denominator("model.norm_eps", self.norm_eps)
        for name, most in LARGEST.items():
            allowed = f"must be at most {most:,}"
            require(getattr(self, name) <= most, f"model.{name}", getattr(self, name), allowed)
        at_least(0, model__head_dim=self.head_dim, model__max_length=self.max_length)
        require(
            self.head_dim > 0 or self.embed_dim % (2 * self.num_heads) == 0,
            "model.num_heads",
            self.num_heads,
            f"embed_dim / num_heads must be an even number, embed_dim is {self.embed_dim}",
        )
        require(
            self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "must be even: features turn in pairs"
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads = {self.num_heads}",
        )
        object.__setattr__(self, "memories", FrozenMapping(self.memories))
        for name, memory in self.memories.items():
            right = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name) and name != "layer"
            allowed = "must be lower-case letters, digits and underscores, and not 'layer'"
            require(bool(right), "name in model.memories", name, allowed)
            require(
                isinstance(memory, MemoryConfig), f"model.memories.{name}", memory, "must be a MemoryConfig"
            )
        _ = self.sites  # reports a malformed placement now, not when the model is built

    @property
    def head_width(self) -> int:
        """Returns d, the width of an attention head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def query_width(self) -> int:
        """Returns A·d, the width of the queries of all heads, and of their pooled values."""
        return self.num_heads * self.head_width

    @property
    def key_width(self) -> int:
        """Returns A_kv·d, the width of the keys of all heads, and of the values."""
        return self.num_kv_heads * self.head_width

    @functools.cached_property
    def sites(self) -> tuple[MemorySite, ...]:
        """Returns all memories, grouped by name; those of one name are in the order of its placement."""
        found: list[MemorySite] = []
        inner = self.moe.top_k * self.moe.expert_dim if self.moe else self.mlp_dim
        for group, memory in self.memories.items():
            path = f"model.memories.{group}"
            spans = parse_placement(memory.placement, self.num_layers, f"{path}.placement")
            context = ModelContext(
                embed_dim=self.embed_dim,
                num_layers=self.num_layers,
                vocab_size=self.vocab_size,
                inner_ratio=inner / self.embed_dim,
                dtype=self.dtype,
                norm_eps=self.norm_eps,
                starts=tuple(span.start for span in spans),
            )
            with built_at(path):
                memory.readout.check_model(memory, context)
                memory.require(
                    memory.table.project_pre_values or memory.table.pre_value_dim == self.embed_dim,
                    "table.pre_value_dim",
                    f"must equal embed_dim = {self.embed_dim} while project_pre_values is False",
                )
                layout = memory.address.layout(memory, context)
            with built_at(f"{path}.address"):
                others = [other.address for name, other in self.memories.items() if name != group]
                memory.address.check_beside(others)
            found += [MemorySite(group, i, span, memory, context, layout) for i, span in enumerate(spans)]
        stood_in = [site.span.start for site in found if site.span.place == "instead"]
        twice = next((layer for layer in stood_in if stood_in.count(layer) > 1), None)
        require(twice is None, "model.memories", f"instead@{twice}, twice", "a layer has one feed-forward")
        return tuple(found)

    @property
    def memory(self) -> MemoryConfig | None:
        """Returns the only memory config of the model, or None.

        Raises:
            UserError: there are several.
        """
        require(
            len(self.memories) <= 1,
            "model.memories",
            list(self.memories),
            "must be one memory for this, or none",
        )
        return next(iter(self.memories.values()), None)

    def with_memory(self, memory: MemoryConfig) -> "ModelConfig":
        """Returns the model with another config of its only memory, which keeps its name."""
        assert self.memory is not None
        return dataclasses.replace(self, memories={name: memory for name in self.memories})

    @property
    def feed_forward_layers(self) -> tuple[int, ...]:
        """Returns the layers, from 1, that have a feed-forward: those in which no memory replaces it."""
        stood_in = {site.span.start for site in self.sites if site.span.place == "instead"}
        return tuple(layer for layer in range(1, self.num_layers + 1) if layer not in stood_in)

    @property
    def layer_groups(self) -> tuple[range, ...]:
        """Returns the layers, from 1, in groups of equal layers that follow each other directly.

        Memories stand between groups: those that read the last layer's state, or land after it, or come
        before the next layer.
        """
        ends = {0, self.num_layers}
        for site in self.sites:
            span = site.span
            if span.place in ("before", "instead"):
                ends |= {span.start - 1}
            if span.place != "before":
                ends |= {span.start, span.end}
        return tuple(range(start + 1, end + 1) for start, end in itertools.pairwise(sorted(ends)))


def layer_name(number: int) -> str:
    """Returns the name of a layer, counted from 1, among the parameters and in the cache."""
    return f"layer_{number}"


def table_readers(config: ModelConfig) -> dict[str, tuple[MemorySite, ...]]:
    """Returns the memories that read each table, by its name in the collection `memory`."""
    readers: dict[str, tuple[MemorySite, ...]] = {}
    for site in config.sites:
        readers[site.table] = (*readers.get(site.table, ()), site)
    return readers
