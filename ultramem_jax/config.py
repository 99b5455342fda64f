"""Every choice of a run, as frozen dataclasses with the source of each default.

A `RunConfig` holds a `ModelConfig` (with its `MemoryConfig`s or `MoEConfig`), a `DataConfig`, a
`TrainConfig` and a `MeshConfig`. They check themselves when they are made: whatever exists is valid. The
letters are those of the axis legend in `ultramem_jax`.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ultramem_jax.errors import UserError, at_least, fraction, guards_a_denominator, require, unknown
from ultramem_jax.field_types import Checked, FilePath, built_at
from ultramem_jax.memory_config import MemoryConfig, MemorySite
from ultramem_jax.memory_kinds import ADDRESSERS, READOUTS
from ultramem_jax.memory_parts import Around, TableConfig
from ultramem_jax.named import Named
from ultramem_jax.old_configs import in_todays_parts
from ultramem_jax.placement import parse_placement
from ultramem_jax.row_states import RowArray, RowOptimizer, row_arrays

_MOST = {"vocab_size": 2**24, "num_layers": 1000, "embed_dim": 2**20}
"""Bounds far above any model. Beyond them a typing error of a few zeros looks like a machine that hangs:
layers are unrolled in the program, and some of what depends on D is computed while it is traced. The deepest
published Transformer has 1,000 layers (DeepNet, arXiv 2203.00555), which take half a minute to trace."""


@dataclass(frozen=True)
class MoEConfig(Checked):
    """A Mixture of Experts in place of every layer's MLP; dropless top-k routing."""

    PREFIX = "model.moe."

    num_experts: int = 32
    top_k: int = 2
    expert_dim: int = 256
    """Inner width of one expert."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """`gelu` (the UltraMem paper's baseline) or `swiglu` (OLMoE's)."""
    normalize_gates: bool = True
    """The k gates are divided by their sum (top-2 models); OLMoE leaves them as softmax gave them."""
    load_balance_weight: float = 0.01
    """Weight of X·Σ f_i·p_i (Switch Transformer, arXiv 2101.03961; OLMoE uses 0.01). f and p are those of a
    micro-batch, over all devices of a mesh: with `TrainConfig.grad_accumulation` the loss is the mean of the
    micro-batches' own, which is not quite that of the whole batch."""
    router_z_weight: float = 1e-3
    """Weight of mean(logsumexp(router logits)²) (ST-MoE, arXiv 2202.08906)."""
    auxiliary_over_layers: Literal["sum", "mean"] = "sum"
    """How the two losses of all layers that have experts are combined: `sum` (Switch Transformer), or `mean`,
    as OLMoE's code does (arXiv 2409.02060), so that their weight does not grow with depth."""
    implementation: Literal["auto", "blocks", "ragged"] = "auto"
    """`blocks`: tokens sorted by expert into padded blocks; `ragged`: `jax.lax.ragged_dot`; `auto` takes
    `ragged` on GPU and TPU and `blocks` on CPU, where `ragged_dot` multiplies by every expert."""

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
class ModelConfig(Checked):
    """A pre-norm decoder. `moe` replaces the MLPs, `memories` are added; there may be none of either."""

    PREFIX = "model."

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
    attention_qk_norm: bool = False
    """RMS norms with gain over all heads' queries and over all heads' keys (OLMoE, arXiv 2409.02060)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """`gelu` or `swiglu`."""
    mlp_dim: int = 512
    """Inner width of the MLP."""
    moe: MoEConfig | None = None
    memories: Mapping[str, MemoryConfig] = field(default_factory=Named)
    """Memories by name, several kinds in one model if they are to be; each has its own places and tables.
    Metrics and parameters of memory `index` of a name are called `name_index`."""
    tie_embeddings: bool = True
    """The output projection is the embedding, transposed."""
    dropout: float = 0.0
    """Probability; after the embedding, attention, the feed-forward and the memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation, `float32` or `bfloat16`; parameters are float32 always, tables as `TableConfig`
    says."""
    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies (RoFormer, arXiv 2104.09864)."""
    norm_eps: float = 1e-5

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
        for name, most in _MOST.items():
            allowed = f"must be at most {most:,}"
            require(getattr(self, name) <= most, f"model.{name}", getattr(self, name), allowed)
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
        object.__setattr__(self, "memories", Named(self.memories))
        for name, memory in self.memories.items():
            right = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name) and name != "layer"
            allowed = "must be lower-case letters, digits and underscores, and not 'layer'"
            require(bool(right), "name in model.memories", name, allowed)
            require(
                isinstance(memory, MemoryConfig), f"model.memories.{name}", memory, "must be a MemoryConfig"
            )
        _ = self.sites  # a malformed placement must not wait until the model is built

    @functools.cached_property
    def sites(self) -> tuple[MemorySite, ...]:
        """All memories, those of one name after the other, in the order of its placement."""
        found: list[MemorySite] = []
        inner = self.moe.top_k * self.moe.expert_dim if self.moe else self.mlp_dim
        for group, memory in self.memories.items():
            path = f"model.memories.{group}"
            spans = parse_placement(memory.placement, self.num_layers, f"{path}.placement")
            around = Around(
                embed_dim=self.embed_dim,
                num_layers=self.num_layers,
                vocab_size=self.vocab_size,
                inner_ratio=inner / self.embed_dim,
                dtype=self.dtype,
                norm_eps=self.norm_eps,
                starts=tuple(span.start for span in spans),
            )
            with built_at(path):
                memory.readout.check_model(memory, around)
                memory.require(
                    memory.table.project_pre_values or memory.table.pre_value_dim == self.embed_dim,
                    "table.pre_value_dim",
                    f"must equal embed_dim = {self.embed_dim} while project_pre_values is False",
                )
                layout = memory.address.layout(memory, around)
            with built_at(f"{path}.address"):
                others = [other.address for name, other in self.memories.items() if name != group]
                memory.address.check_beside(others)
            found += [MemorySite(group, i, span, memory, around, layout) for i, span in enumerate(spans)]
        stood_in = [site.span.start for site in found if site.span.place == "instead"]
        twice = next((layer for layer in stood_in if stood_in.count(layer) > 1), None)
        require(twice is None, "model.memories", f"instead@{twice}, twice", "a layer has one feed-forward")
        return tuple(found)

    @property
    def memory(self) -> MemoryConfig | None:
        """The one memory of the model, or None.

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
        """Returns the model with another config of its one memory, which keeps its name."""
        assert self.memory is not None
        return dataclasses.replace(self, memories={name: memory for name in self.memories})

    @property
    def feed_forward_layers(self) -> tuple[int, ...]:
        """The layers, from 1, that have a feed-forward: all in which no memory stands in for it."""
        stood_in = {site.span.start for site in self.sites if site.span.place == "instead"}
        return tuple(layer for layer in range(1, self.num_layers + 1) if layer not in stood_in)


@dataclass(frozen=True)
class DataConfig(Checked):
    """What is read. Splits, tokenizers and files are described in `ultramem_jax.data`."""

    PREFIX = "data."

    dataset: str = "stdlib"
    """`stdlib` (this Python's own sources), `enwik8` or `text` (both by `path`), or `tfds:NAME`."""
    path: FilePath = ""
    """A file or folder for `enwik8` (plain or .gz) and `text`; for `tfds:NAME` TFDS' own, or empty."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """`bytes`, or `bpe`: byte-pair encoding trained on the corpus' training split."""
    bpe_vocab_size: int = 8192
    """Vocabulary of `bpe`, end-of-document token included."""
    seq_len: int = 256
    """S, tokens that a sequence predicts."""
    cache_dir: FilePath = ""
    """Where prepared corpora are kept; empty: $ULTRAMEM_CACHE, else ~/.cache/ultramem_jax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, data__seq_len=self.seq_len)
        at_least(258, data__bpe_vocab_size=self.bpe_vocab_size)
        most = _MOST["vocab_size"]
        require(
            self.bpe_vocab_size <= most,
            "data.bpe_vocab_size",
            self.bpe_vocab_size,
            f"must be at most {most:,}",
        )


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How it is trained. Defaults that have a source are the UltraMem paper's (its training of table 1)."""

    PREFIX = "train."

    steps: int = 1000
    batch_size: int = 16
    """Sequences per step, over all devices and accumulated micro-batches."""
    grad_accumulation: int = 1
    """Micro-batches that a step is cut into. Gradients and losses are their means; the loads that balance
    losses spread, of experts and of UltraMemV2's keys, are each micro-batch's own."""
    learning_rate: float = 1e-3
    """Peak, reached after warm-up."""
    warmup_fraction: float = 0.01
    """Share of the steps that the learning rate rises over, linearly from 0."""
    final_lr_fraction: float = 0.1
    """The cosine ends at this share of the peak."""
    optimizer: Literal["adamw", "muon", "lion"] = "adamw"
    """Of the dense parameters: `adamw`; `muon` (Jordan et al., 2024) on the weights of matrix products, each
    expert's by themselves, and AdamW on the rest; or `lion` (arXiv 2302.06675)."""
    b1: float = 0.9
    """Of AdamW, the decay of the first moment; of Lion, the weight of its momentum in a step."""
    b2: float = 0.95
    """Of AdamW, the decay of the second moment; of Lion, that of its momentum."""
    eps: float = 1e-8
    """The least root of squared gradients that AdamW and Adagrad divide by."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate, for every optimizer; on matrices, and on the rows of a table that
    were read. Not on gains and biases."""
    clip_norm: float = 1.0
    """Global norm that the gradient of the dense parameters is clipped to. 0 is off."""
    table_gradient: Literal["row_sparse", "dense"] = "row_sparse"
    """`row_sparse` touches the rows that were read; `dense` is the plain way, linear in slots: the oracle."""
    row_optimizer: RowOptimizer = "adamw"
    """Of the rows of tables, see `ultramem_jax.training.row_rules`: `adamw`; `adamw_catch_up`, whose moments
    first decay by the steps that did not read the row; `adagrad`; `adagrad_row`, which keeps one number per
    row; `sgd`; `sgd_momentum`."""
    momentum: float = 0.9
    """Decay of the trace of `sgd_momentum`."""
    row_second_moment: Literal["element", "row"] = "element"
    """Of Adam on a table's rows: `element` keeps one for every value, `row` one for all values of a row."""
    row_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the moments of a row's values, `float32` or `bfloat16`; also of Adagrad's sums and the trace of SGD.
    What is kept once per row is float32."""
    row_rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Of what is kept in bfloat16: `stochastic`, right on average however small an update, or `nearest`."""
    seed: int = 0
    """Of initialisation, dropout and the order of the data."""
    log_every: int = 10
    """Steps between training records, whose losses are means over these steps. The last step is recorded."""
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
        super().__post_init__()
        at_least(1, train__steps=self.steps, train__batch_size=self.batch_size)
        at_least(1, train__grad_accumulation=self.grad_accumulation, train__log_every=self.log_every)
        at_least(1, train__keep_last=self.keep_last)
        at_least(0, train__keep_best=self.keep_best, train__eval_every=self.eval_every)
        at_least(0, train__eval_batches=self.eval_batches, train__seed=self.seed)
        at_least(0, train__checkpoint_every=self.checkpoint_every, train__clip_norm=self.clip_norm)
        at_least(0, train__weight_decay=self.weight_decay, train__learning_rate=self.learning_rate)
        fraction(train__warmup_fraction=self.warmup_fraction, train__b1=self.b1, train__b2=self.b2)
        fraction(train__momentum=self.momentum)
        guards_a_denominator("train.eps", self.eps)
        require(self.steps < 2**31, "train.steps", self.steps, "must be below 2**31: int32")
        require(self.seed < 2**32, "train.seed", self.seed, "must be below 2**32")
        require(
            0 <= self.final_lr_fraction <= 1,
            "train.final_lr_fraction",
            self.final_lr_fraction,
            "must be in [0, 1]",
        )
        for name, plain in (("row_second_moment", "element"), ("row_moment_dtype", "float32")):
            require(
                self.table_gradient == "row_sparse" or getattr(self, name) == plain,
                f"train.{name}",
                getattr(self, name),
                f"must be {plain!r} while train.table_gradient is 'dense'",
            )
        require(
            self.table_gradient == "row_sparse" or self.row_optimizer != "adamw_catch_up",
            "train.table_gradient",
            self.table_gradient,
            "must be 'row_sparse' while train.row_optimizer is 'adamw_catch_up': it asks which rows are read",
        )
        self._check_row_options()
        require(
            self.batch_size % self.grad_accumulation == 0,
            "train.grad_accumulation",
            self.grad_accumulation,
            f"must divide batch_size = {self.batch_size}",
        )

    def _check_row_options(self) -> None:
        """Refuses options that the optimizer of rows does not have."""
        without = f"while train.row_optimizer is {self.row_optimizer!r}"
        options = {"second_moment": "element", "moment_dtype": "float32"}
        for name, plain in options.items():
            value = getattr(self, f"row_{name}")
            changed = row_arrays(self.row_optimizer, **{name: value}) != row_arrays(self.row_optimizer)
            require(changed or value == plain, f"train.row_{name}", value, f"must be {plain!r} {without}")
        plain_momentum = TrainConfig.momentum
        require(
            self.row_optimizer == "sgd_momentum" or self.momentum == plain_momentum,
            "train.momentum",
            self.momentum,
            f"must be {plain_momentum} {without}: only 'sgd_momentum' has one",
        )

    @property
    def row_arrays(self) -> tuple[RowArray, ...]:
        """Lists what the optimizer of rows keeps for each row of a table."""
        return row_arrays(self.row_optimizer, self.row_second_moment, self.row_moment_dtype)


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along named axes; the product of all is their number. A run may go on on another mesh.

    Sequences of a batch are split over `data` and `fsdp` and, unless `batch_over_memory` is off, over
    `memory` and `width`. Devices along `tensor` work on the same sequences.
    """

    PREFIX = "mesh."

    data: int = 0
    """Data parallelism: every device along it has all parameters. 0: the devices that the others leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: dense parameters and their optimizer state are split over it, by their
    axis of width D, and keys by their number."""
    tensor: int = 1
    """Tensor parallelism: attention heads, the inner width of MLPs and, if it divides, the vocabulary."""
    memory: int = 1
    """Sparse parameters: tables are split over it, as `TableConfig.partition` says, and experts."""
    width: int = 1
    """Columns of tables, where `TableConfig.partition` is `both`."""
    batch_over_memory: bool = True
    """Whether devices along `memory` and `width` have sequences of their own, or all the same ones: for
    batches smaller than the number of devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, mesh__data=self.data)
        at_least(1, mesh__fsdp=self.fsdp, mesh__tensor=self.tensor)
        at_least(1, mesh__memory=self.memory, mesh__width=self.width)


@dataclass(frozen=True)
class RunConfig(Checked):
    """One run: what `python launch.py train` needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_mesh()
        for group, memory in self.model.memories.items():
            for name, plain in (("dtype", "float32"), ("memory_kind", "device")):
                value = getattr(memory.table, name)
                require(
                    value == plain or self.train.table_gradient == "row_sparse",
                    "train.table_gradient",
                    self.train.table_gradient,
                    f"must be 'row_sparse' while model.memories.{group}.table.{name} is {value!r}",
                )

    def _check_mesh(self) -> None:
        """What is split over an axis of the mesh must divide."""
        mesh, model = self.mesh, self.model
        divisible = [
            ("fsdp", "model.embed_dim", model.embed_dim),
            ("tensor", "model.num_kv_heads", model.num_kv_heads),
            ("tensor", "model.num_heads", model.num_heads),
        ]
        if model.moe is None:
            divisible.append(("tensor", "model.mlp_dim", model.mlp_dim))
        else:
            divisible.append(("tensor", "model.moe.expert_dim", model.moe.expert_dim))
            divisible.append(("memory", "model.moe.num_experts", model.moe.num_experts))
        if not model.memories:
            require(mesh.width == 1, "mesh.width", mesh.width, "must be 1 without a memory")
            require(
                mesh.memory == 1 or model.moe is not None,
                "mesh.memory",
                mesh.memory,
                "must be 1 without a memory and without experts: there is nothing to split over it",
            )
        partitions = {site.config.table.partition for site in model.sites}
        require(
            len(partitions) <= 1,
            "model.memories",
            sorted(partitions),
            "must have one partition: all tables of a model are split alike",
        )
        for group, memory in model.memories.items():
            divisible += self._check_table(group, memory)
        for axis, name, size in divisible:
            require(
                size % getattr(mesh, axis) == 0,
                f"mesh.{axis}",
                getattr(mesh, axis),
                f"must divide {name} = {size}",
            )

    def _check_table(self, group: str, memory: MemoryConfig) -> list[tuple[str, str, int]]:
        """Checks a memory against mesh and batch; returns (mesh axis, name, size) of what must divide."""
        mesh, table, path = self.mesh, memory.table, f"model.memories.{group}"
        divisible = []
        sites = [site for site in self.model.sites if site.group == group]
        slots = {site.num_slots for site in sites}
        require(
            mesh.width == 1 or table.partition == "both",
            "mesh.width",
            mesh.width,
            f"must be 1 while {path}.table.partition is {table.partition!r}",
        )
        if table.partition != "width":
            name = "num_slots of a table" + memory.address.slots_hint
            divisible += [("memory", name, size) for size in sorted(slots)]
        of_width = {"slots": None, "width": "memory", "both": "width"}[table.partition]
        if of_width:
            divisible.append((of_width, f"{path}.table.value_dim", table.value_dim))
            divisible.append((of_width, f"{path}.table.pre_value_dim", table.pre_value_dim))
            parts, weights = getattr(mesh, of_width), memory.address.weights_per_read
            require(
                parts % weights == 0 or weights % parts == 0,
                f"mesh.{of_width}",
                parts,
                f"must divide the {weights} weights of a read of {path} or be a multiple of them: each "
                "weighs its own slice of a value",
            )
        reads = self.train.batch_size * self.data.seq_len * memory.reads_per_token
        reads *= len(sites) if table.is_shared else 1
        require(
            max(slots, default=0) + reads < 2**31,
            "train.batch_size",
            self.train.batch_size,
            f"makes {reads:,} reads of a table in a step; with its {max(slots, default=0):,} slots they must "
            "be fewer than 2**31: int32",
        )
        require(
            table.memory_kind == "device" or mesh.memory == mesh.width == 1,
            f"{path}.table.memory_kind",
            table.memory_kind,
            "must be 'device' while tables are split over devices, mesh.memory or mesh.width above 1",
        )
        return divisible


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as nested plain dicts, for JSON; `None` for an absent part."""
    if isinstance(config, Mapping):
        return {name: to_dict(value) for name, value in config.items()}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {one.name: to_dict(getattr(config, one.name)) for one in dataclasses.fields(config)}
    return config


def run_config_from_dict(tree: dict[str, Any]) -> RunConfig:
    """Returns the `RunConfig` of which `to_dict` made the tree, also where an earlier version did.

    Raises:
        UserError: an unknown key (with the nearest known one), or a value that is not allowed.
    """
    return _build(RunConfig, in_todays_parts(tree), "")


def _part(cls: type, field: str, tree: Any, path: str) -> Any:
    """Returns the config that a field holds, or the value itself where it is not one."""
    parts: dict[tuple[type, str], Any] = {
        (RunConfig, "model"): ModelConfig,
        (RunConfig, "data"): DataConfig,
        (RunConfig, "train"): TrainConfig,
        (RunConfig, "mesh"): MeshConfig,
        (ModelConfig, "moe"): MoEConfig,
        (MemoryConfig, "address"): ADDRESSERS,
        (MemoryConfig, "table"): TableConfig,
        (MemoryConfig, "readout"): READOUTS,
    }
    if (cls, field) == (ModelConfig, "memories"):
        _require_dict(tree, path, "memories by name")
        return {name: _build(MemoryConfig, of, f"{path}.{name}") for name, of in tree.items()}
    part = parts.get((cls, field))
    if part is None or tree is None:
        return tree
    if part in (ADDRESSERS, READOUTS):
        _require_dict(tree, path, "the fields of a kind")
        if "kind" not in tree:
            raise UserError(f"{path}: must have the field 'kind', one of {', '.join(part.kinds())}")
        part = part[str(tree["kind"])]
    return _build(part, tree, path)


def _require_dict(tree: Any, path: str, of: str) -> None:
    if not isinstance(tree, Mapping):
        raise UserError(f"{path or 'config'} = {tree!r}: must be a dict of {of}")


def _build(cls: type, tree: Any, path: str) -> Any:
    _require_dict(tree, path, f"the fields of {cls.__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            raise unknown(f"config key {where!r}:", str(key), known)
        values[key] = _part(cls, key, value, where)
    needed = {RunConfig: ("model", "data", "train"), MemoryConfig: ("address",)}.get(cls, ())
    for part in needed:
        if part not in values:
            raise UserError(f"{path or 'config'}: must have the part {part!r}")
    with built_at(path):
        return cls(**values)
