"""Every choice of a run, as frozen dataclasses with the source of each default.

A `RunConfig` holds a `ModelConfig` (with its `MemoryConfig` or `MoEConfig`), a `DataConfig` and a
`TrainConfig`. They check themselves when they are made: whatever exists is valid. The letters are those of
the axis legend in `ultramem_jax`.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ultramem_jax.errors import require, unknown
from ultramem_jax.placement import Span, parse_placement


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise unknown(name, value, allowed)


def _at_least(low: float, **fields: float) -> None:
    for name, value in fields.items():
        require(value >= low, name.replace("__", "."), value, f"must be at least {low}")


def _fraction(**fields: float) -> None:
    for name, value in fields.items():
        require(0 <= value < 1, name.replace("__", "."), value, "must be in [0, 1)")


@dataclass(frozen=True)
class MemoryConfig:
    """One memory layer, from Product-Key Memory to UltraMem: each of the paper's changes is a switch.

    `MemoryConfig.pkm()` has all switches off, `MemoryConfig.ultramem()` has all of them on (numbers as in
    the ablation of the UltraMem paper, table 2). The defaults are UltraMem's.
    """

    placement: str = "full"
    """Which layer feeds which memory (`ultramem_jax.placement`). Change 4, "split big memory & skip"."""
    num_keys: int = 128
    """n, keys per side of the physical grid; the table has N = n² slots."""
    top_m: int = 16
    """m, values read per head and token."""
    num_heads: int = 2
    """H, retrieval heads; their reads are summed."""
    key_dim: int = 64
    """d_k, width of a query and of a key, per side."""
    value_dim: int = 128
    """d_v, width of a stored value. Change 2, "half vdim + proj", is D/2 with `project_values`."""
    softmax: bool = False
    """Scores pass through a softmax over the m reads of a head. Change 1 removes it."""
    project_values: bool = True
    """A linear map (E·d_v -> D) after pooling; without it d_v must equal D and E must be 1."""
    share_query: bool = True
    """Change 3: all heads use one query."""
    norm_query_key: bool = True
    """Change 5: RMS norms with gain over d_k on queries and keys."""
    expansion: int = 4
    """Change 6, Implicit Value Expansion: E virtual blocks per table, a square. 1 is off."""
    shuffle: str = "keyed"
    """How virtual addresses are permuted: `keyed` computes a bijection on the fly (where E > 1; one block has
    nothing to gain), `explicit` reads a stored permutation of E·N entries (random at first; for imported
    weights), `none` leaves them as they are."""
    shuffle_seed: int = 0
    """Which permutation; each memory of a model adds its own index."""
    tucker_rank: int = 2
    """Change 7, TDQKR: r, rank of the Tucker core. 0 is off: row and column scores are added, as in PKM."""
    rank_keys: str = "split"
    """`split`: the d_k dimensions fall into r groups, one per rank (the paper). `full`: every rank has keys
    of full width d_k and all ranks share the query (the authors' code)."""
    num_cores: int = 2
    """Change 8, Multi-Core Scoring: h cores, one score per slice of d_v/h. 1 is off."""
    core_loss_weight: float = 1e-3
    """α of the auxiliary loss on the core's singular values (paper, section 3). 0 is off."""
    core_loss_margin: float = 0.15
    """τ: the singular values λ_i, i >= 2, are pushed below it."""
    init: str = "paper"
    """Change 9. `paper`: output variance starts at 1/(2L) (without softmax, whose weights are smaller).
    `reference`: as in the authors' code. `pkm`: as in Product-Key Memory."""
    value_lr_multiple: float = 10.0
    """Change 10: the values' learning rate starts at this multiple and falls linearly to 1x (paper: 10; the
    authors' code and V2: 4). 1 is off."""
    query_conv_width: int = 4
    """Change 11: width of the causal depthwise convolution before the query projection. 0 is off."""

    def __post_init__(self) -> None:
        _at_least(1, model__memory__num_keys=self.num_keys, model__memory__top_m=self.top_m)
        _at_least(1, model__memory__num_heads=self.num_heads, model__memory__key_dim=self.key_dim)
        _at_least(1, model__memory__value_dim=self.value_dim, model__memory__num_cores=self.num_cores)
        _at_least(1, model__memory__value_lr_multiple=self.value_lr_multiple)
        _at_least(0, model__memory__tucker_rank=self.tucker_rank)
        _at_least(0, model__memory__query_conv_width=self.query_conv_width)
        _at_least(0, model__memory__core_loss_weight=self.core_loss_weight)
        _at_least(0, model__memory__core_loss_margin=self.core_loss_margin)
        _at_least(0, model__memory__shuffle_seed=self.shuffle_seed)
        _choice("model.memory.shuffle", self.shuffle, ("keyed", "explicit", "none"))
        _choice("model.memory.rank_keys", self.rank_keys, ("split", "full"))
        _choice("model.memory.init", self.init, ("paper", "reference", "pkm"))
        prefix = "model.memory."
        require(
            self.expansion >= 1 and math.isqrt(self.expansion) ** 2 == self.expansion,
            prefix + "expansion",
            self.expansion,
            "must be a square: 1, 4, 9, 16, ...",
        )
        require(
            self.top_m <= self.num_virtual_keys,
            prefix + "top_m",
            self.top_m,
            f"must be at most the candidates of a side, sqrt(expansion) * num_keys = {self.num_virtual_keys}",
        )
        require(
            self.num_slots < 2**31,
            prefix + "num_keys",
            self.num_keys,
            "num_keys squared must stay below 2**31, slots are int32",
        )
        require(
            self.shuffle != "explicit" or self.num_virtual_keys**2 < 2**31,
            prefix + "shuffle",
            self.shuffle,
            "must be 'keyed' where expansion * num_keys squared reaches 2**31, addresses are int32",
        )
        require(
            self.value_dim % self.num_cores == 0,
            prefix + "num_cores",
            self.num_cores,
            f"must divide value_dim = {self.value_dim}",
        )
        require(
            self.num_cores == 1 or self.tucker_rank >= 1,
            prefix + "num_cores",
            self.num_cores,
            "must be 1 while tucker_rank is 0: the cores are Tucker cores",
        )
        if self.tucker_rank > 1 and self.rank_keys == "split":
            require(
                self.key_dim % self.tucker_rank == 0,
                prefix + "tucker_rank",
                self.tucker_rank,
                f"must divide key_dim = {self.key_dim} while rank_keys is 'split'",
            )
        require(
            self.expansion == 1 or self.project_values,
            prefix + "project_values",
            self.project_values,
            f"must be True while expansion is {self.expansion}: each block needs its projector",
        )

    @property
    def num_slots(self) -> int:
        """N = n², physical values in one table."""
        return self.num_keys**2

    @property
    def num_virtual_keys(self) -> int:
        """√E·n, keys per side of the expanded grid."""
        return math.isqrt(self.expansion) * self.num_keys

    @property
    def num_queries(self) -> int:
        """Queries per side: one if the heads share it, else one per head."""
        return 1 if self.share_query else self.num_heads

    @property
    def rank_key_dim(self) -> int:
        """Width of the part of a key that one rank scores with."""
        return self.key_dim // max(self.tucker_rank, 1) if self.rank_keys == "split" else self.key_dim

    @classmethod
    def pkm(cls, **fields: Any) -> "MemoryConfig":
        """Product-Key Memory (arXiv 1907.05242): every switch off. Give `value_dim` = D."""
        off: dict[str, Any] = dict(
            softmax=True,
            project_values=False,
            share_query=False,
            norm_query_key=False,
            expansion=1,
            tucker_rank=0,
            num_cores=1,
            init="pkm",
            value_lr_multiple=1.0,
            query_conv_width=0,
        )
        return cls(**(off | fields))

    @classmethod
    def ultramem(cls, **fields: Any) -> "MemoryConfig":
        """UltraMem (arXiv 2411.12364): every switch on."""
        return cls(**fields)


@dataclass(frozen=True)
class MoEConfig:
    """A Mixture of Experts in place of every layer's MLP; dropless top-k routing."""

    num_experts: int = 32
    top_k: int = 2
    expert_dim: int = 256
    """Inner width of one expert."""
    activation: str = "gelu"
    """`gelu` (the UltraMem paper's baseline) or `swiglu` (OLMoE's)."""
    normalize_gates: bool = True
    """The k gates are divided by their sum (top-2 models); OLMoE leaves them as softmax gave them."""
    load_balance_weight: float = 0.01
    """Weight of E·Σ f_i·p_i (Switch Transformer, arXiv 2101.03961; OLMoE uses 0.01)."""
    router_z_weight: float = 1e-3
    """Weight of mean(logsumexp(router logits)²) (ST-MoE, arXiv 2202.08906)."""
    implementation: str = "auto"
    """`blocks`: tokens sorted by expert into padded blocks; `ragged`: `jax.lax.ragged_dot`; `auto` takes
    `ragged` on GPU and TPU and `blocks` on CPU, where `ragged_dot` multiplies by every expert."""

    def __post_init__(self) -> None:
        _at_least(1, model__moe__num_experts=self.num_experts, model__moe__top_k=self.top_k)
        _at_least(1, model__moe__expert_dim=self.expert_dim)
        _at_least(0, model__moe__load_balance_weight=self.load_balance_weight)
        _at_least(0, model__moe__router_z_weight=self.router_z_weight)
        _choice("model.moe.activation", self.activation, ("gelu", "swiglu"))
        _choice("model.moe.implementation", self.implementation, ("auto", "blocks", "ragged"))
        require(
            self.top_k <= self.num_experts,
            "model.moe.top_k",
            self.top_k,
            f"must be at most num_experts = {self.num_experts}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder. `moe` replaces the MLPs, `memory` adds memories beside them; either may be None."""

    vocab_size: int = 257
    """V. Bytes and one end-of-document token; see `ultramem_jax.data.tokenizers`."""
    embed_dim: int = 128
    """D, width of the residual stream."""
    num_layers: int = 4
    """L."""
    num_heads: int = 4
    """A, attention heads; D/A wide each."""
    num_kv_heads: int = 4
    """Heads of keys and values; fewer than `num_heads` is grouped-query attention."""
    mlp: str = "gelu"
    """`gelu` or `swiglu`."""
    mlp_dim: int = 512
    """Inner width of the MLP."""
    moe: MoEConfig | None = None
    memory: MemoryConfig | None = None
    tie_embeddings: bool = True
    """The output projection is the embedding, transposed."""
    dropout: float = 0.0
    """Probability; after the embedding, attention, the feed-forward and the memory."""
    dtype: str = "float32"
    """Of the computation, `float32` or `bfloat16`; parameters and tables are float32 always."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies (RoFormer, arXiv 2104.09864)."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _at_least(1, model__vocab_size=self.vocab_size, model__embed_dim=self.embed_dim)
        _at_least(1, model__num_layers=self.num_layers, model__num_heads=self.num_heads)
        _at_least(1, model__num_kv_heads=self.num_kv_heads, model__mlp_dim=self.mlp_dim)
        _fraction(model__dropout=self.dropout)
        require(self.rope_theta > 1, "model.rope_theta", self.rope_theta, "must be above 1")
        require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "must be above 0")
        _choice("model.mlp", self.mlp, ("gelu", "swiglu"))
        _choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        require(
            self.embed_dim % (2 * self.num_heads) == 0,
            "model.num_heads",
            self.num_heads,
            f"embed_dim / num_heads must be an even number, embed_dim is {self.embed_dim}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads = {self.num_heads}",
        )
        if self.memory is not None:
            require(
                self.memory.project_values or self.memory.value_dim == self.embed_dim,
                "model.memory.value_dim",
                self.memory.value_dim,
                f"must equal embed_dim = {self.embed_dim} while project_values is False",
            )
        _ = self.spans  # a malformed placement must not wait until the model is built

    @property
    def spans(self) -> tuple[Span, ...]:
        """The memories of the placement."""
        if self.memory is None:
            return ()
        return parse_placement(self.memory.placement, self.num_layers, "model.memory.placement")


@dataclass(frozen=True)
class DataConfig:
    """What is read. Splits, tokenizers and files are described in `ultramem_jax.data`."""

    dataset: str = "stdlib"
    """`stdlib` (this Python's own sources), `enwik8` or `text` (both by `path`), or `tfds:NAME`."""
    path: str = ""
    """A file or folder for `enwik8` (plain or .gz) and `text`; for `tfds:NAME` TFDS' own, or empty."""
    tokenizer: str = "bytes"
    """`bytes`, or `bpe`: byte-pair encoding trained on the corpus' training split."""
    bpe_vocab_size: int = 8192
    """Vocabulary of `bpe`, end-of-document token included."""
    seq_len: int = 256
    """S, tokens that a sequence predicts."""
    cache_dir: str = ""
    """Where prepared corpora are kept; empty: $ULTRAMEM_CACHE, else ~/.cache/ultramem_jax."""

    def __post_init__(self) -> None:
        _choice("data.tokenizer", self.tokenizer, ("bytes", "bpe"))
        _at_least(2, data__seq_len=self.seq_len)
        _at_least(258, data__bpe_vocab_size=self.bpe_vocab_size)


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. Defaults that have a source are the UltraMem paper's (its training of table 1)."""

    steps: int = 1000
    batch_size: int = 16
    """Sequences per step, over all devices and accumulated micro-batches."""
    grad_accumulation: int = 1
    """Micro-batches that a step is cut into."""
    learning_rate: float = 1e-3
    """Peak, reached after warm-up."""
    warmup_fraction: float = 0.01
    """Share of the steps that the learning rate rises over, linearly from 0."""
    final_lr_fraction: float = 0.1
    """The cosine ends at this share of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled (AdamW); on matrices, and on the rows of a table that were read. Not on gains and biases."""
    clip_norm: float = 1.0
    """Global norm that the gradient of the dense parameters is clipped to. 0 is off."""
    table_gradient: str = "row_sparse"
    """`row_sparse` touches the rows that were read; `dense` is the plain way, linear in slots: the oracle."""
    seed: int = 0
    """Of initialisation, dropout and the order of the data."""
    log_every: int = 10
    eval_every: int = 250
    """Steps between evaluations. The last step always evaluates. 0 is the last step alone."""
    eval_batches: int = 32
    """Batches of the validation split per evaluation, the same ones each time. 0 is all."""
    checkpoint_every: int = 250
    """Steps between checkpoints. The last step always saves. 0 is the last step alone."""
    keep_last: int = 2
    keep_best: int = 1
    """Checkpoints kept: the newest ones, and the best by validation loss. Only a checkpoint of a step that
    also evaluates can be among the best: make `checkpoint_every` a multiple of `eval_every`."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        _at_least(1, train__steps=self.steps, train__batch_size=self.batch_size)
        _at_least(1, train__grad_accumulation=self.grad_accumulation, train__log_every=self.log_every)
        _at_least(1, train__keep_last=self.keep_last)
        _at_least(0, train__keep_best=self.keep_best, train__eval_every=self.eval_every)
        _at_least(0, train__eval_batches=self.eval_batches, train__seed=self.seed)
        _at_least(0, train__checkpoint_every=self.checkpoint_every, train__clip_norm=self.clip_norm)
        _at_least(0, train__weight_decay=self.weight_decay, train__learning_rate=self.learning_rate)
        _fraction(train__warmup_fraction=self.warmup_fraction, train__b1=self.b1, train__b2=self.b2)
        require(self.eps > 0, "train.eps", self.eps, "must be above 0")
        require(self.seed < 2**32, "train.seed", self.seed, "must be below 2**32")
        require(
            0 <= self.final_lr_fraction <= 1,
            "train.final_lr_fraction",
            self.final_lr_fraction,
            "must be in [0, 1]",
        )
        _choice("train.table_gradient", self.table_gradient, ("row_sparse", "dense"))
        require(
            self.batch_size % self.grad_accumulation == 0,
            "train.grad_accumulation",
            self.grad_accumulation,
            f"must divide batch_size = {self.batch_size}",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run: what `python launch.py train` needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dicts, for JSON; `None` for an absent part."""
    return dataclasses.asdict(config)


_PARTS: dict[str, type] = {
    "model": ModelConfig,
    "model.moe": MoEConfig,
    "model.memory": MemoryConfig,
    "data": DataConfig,
    "train": TrainConfig,
}


def run_config_from_dict(tree: dict[str, Any]) -> RunConfig:
    """The inverse of `to_dict` for a `RunConfig`.

    Raises:
        UserError: an unknown key (with the nearest known one), or a value that is not allowed.
    """
    return _build(RunConfig, tree, "")


def _build(cls: type, tree: dict[str, Any], path: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            raise unknown(f"config key {where!r}:", key, known)
        if where in _PARTS and value is not None:
            value = _build(_PARTS[where], value, where)
        values[key] = value
    return cls(**values)
