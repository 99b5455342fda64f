"""Turns the config of an OLMo checkpoint, in the code of the UltraMem authors, into a `ModelConfig`.

The authors train inside OLMo (release of August 2025). A checkpoint is a folder whose `config.yaml` holds the
fields of the model under `model`. Fields that this project does not compute must have the value at which they
do nothing. Fields that change only the training or the speed of the authors' code are ignored.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import yaml

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.model import MoEConfig
from ultramem_jax.errors import UserError, require, whole_number
from ultramem_jax.interop.hyper import Reference
from ultramem_jax.interop.olmo_fields import DEFAULTS
from ultramem_jax.tree_types import JsonDict

T = TypeVar("T")

CONFIG_FILE = "config.yaml"
MEMORY = "memory"
"""Name of the memories in `ModelConfig.memories`."""
Dtype = Literal["float32", "bfloat16"]
"""A value of `ModelConfig.dtype`."""
QkNorm = Literal["none", "all_heads", "per_head"]
"""A value of `ModelConfig.attention_qk_norm`."""

_CORES = dict(tucker_rank=2, tucker_multihead=2)
"""Hyper-parameters that the authors' code does not read from the config."""
_LAYERS = {"ultramem_v1": "v1", "ultramem_v2": "v2", "memory_plus": "memory_plus"}
"""Kind of layer, as `Reference` names it, of every `mem_type`."""
_MOST_HEADS = 2
"""Heads that the one query of the authors' UltraMem layers can serve: head i takes query i // 2."""


@dataclass(frozen=True)
class OlmoModel:
    """Describes one checkpoint: the model, the layers that its memories are, and the parts of its tables."""

    config: ModelConfig
    reference: Reference | None
    """The memories of the model, or for `v1` each one of them. None without memories."""
    table_parts: int
    """P, files over which the columns of a table are divided."""
    queries_kept: int | None
    """Rows of `query_proj.weight` that the layers read, from the first. None is all of them."""


def read_section(folder: pathlib.Path) -> JsonDict | None:
    """Returns the section `model` of a folder's `config.yaml`, or None if it is not one of OLMo's."""
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    section = config.get("model") if isinstance(config, dict) else None
    found = isinstance(section, dict) and {"d_model", "n_layers"} <= section.keys()
    return section if found else None


def olmo_model(
    section: Mapping[str, Any], where: str, qk_norm: QkNorm, dtype: Dtype, released_queries: bool
) -> OlmoModel:
    """Returns the model that the fields describe.

    Args:
        section: the fields, which passed `check_section`.
        where: path of the file, for messages.
        qk_norm: norm of queries and keys if the config says that there is one.
        dtype: dtype of the computation.
        released_queries: see `load_olmo`.

    Raises:
        UserError: a field has a value that it cannot have, or that does not fit the others.
    """
    fields = _Fields(section, where)
    block = fields.text("block_type", ("sequential", "moe"))
    if not fields.switch("attention_layer_norm"):
        qk_norm = "none"
    num_heads, num_layers = fields.integer("n_heads"), fields.integer("n_layers")
    embed_dim, norm_eps = fields.integer("d_model"), fields.number("layer_norm_eps")
    hidden = fields.optional_integer("mlp_hidden_size") or fields.integer("mlp_ratio") * embed_dim
    require(hidden % 2 == 0, f"{where}: model.mlp_hidden_size", hidden, "must be even: half of it is a gate")
    placement = fields.placement(num_layers)
    moe = _moe(fields, hidden // 2) if block == "moe" else None
    allowed = "must be 'no_mem' with block_type 'moe': memories read the MLP's input in sequential blocks"
    way = section.get("mem_insert_way", DEFAULTS["mem_insert_way"])
    require(moe is None or placement == "none", f"{where}: model.mem_insert_way", way, allowed)
    sizes = dict(hidden_size=embed_dim, norm_eps=norm_eps)
    num_memories = num_layers if placement == "full" else placement.count("/") + 1
    reference, kept = None, None
    if placement != "none":
        reference, kept = _memories(fields, num_memories, sizes, released_queries)
    memories = {MEMORY: dataclasses.replace(reference.config, placement=placement)} if reference else {}
    fields_of_model: JsonDict = dict(
        vocab_size=fields.optional_integer("embedding_size") or fields.integer("vocab_size"),
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.num_kv_heads(num_heads),
        attention_qk_norm=qk_norm,
        mlp="swiglu",
        mlp_dim=hidden // 2,
        moe=moe,
        memories=memories,
        tie_embeddings=fields.switch("weight_tying"),
        dtype=dtype,
        rope_theta=fields.number("rope_theta"),
        max_length=fields.integer("max_sequence_length"),
        norm_eps=norm_eps,
    )
    return OlmoModel(
        _located(lambda: ModelConfig(**fields_of_model), where),
        reference,
        fields.table_parts(reference),
        kept,
    )


def _moe(fields: "_Fields", expert_dim: int) -> MoEConfig:
    return _located(
        lambda: MoEConfig(
            num_experts=fields.integer("moe_num_experts"),
            top_k=fields.integer("moe_top_k"),
            expert_dim=expert_dim,
            activation="swiglu",
            normalize_gates=False,
            load_balance_weight=fields.number("moe_loss_weight"),
            router_z_weight=fields.number("moe_zloss_weight") if fields.value("moe_zloss_weight") else 0.0,
            auxiliary_over_layers="mean",
        ),
        fields.where,
    )


def _memories(
    fields: "_Fields", num_memories: int, sizes: JsonDict, released_queries: bool
) -> tuple[Reference, int | None]:
    """Returns the layers, and how many rows of their query projections are read (None: all)."""
    layer = _LAYERS[fields.text("mem_type", tuple(_LAYERS))]
    hyper: JsonDict = sizes | dict(layer=layer, layers=num_memories) | _CORES
    # `Reference` calls them by these names without the prefix.
    for name in DEFAULTS:
        if name.startswith("mem_") and name not in ("mem_type", "mem_insert_way", "mem_parallel_size"):
            hyper[name.removeprefix("mem_")] = fields.value(name)
    for name in ("share_ratio", "key_balance_reg_coef"):
        hyper[name] = fields.number(f"mem_{name}")
    kept = None
    if layer == "v1":
        hyper["value_expand_time"] = 4  # a constant of the authors' code
    if layer == "v2" and released_queries and fields.switch("mem_q_for_each_tucker_rank"):
        hyper["q_for_each_tucker_rank"] = False
        kept = 2 * fields.integer("mem_kdim")
    try:
        reference = Reference.of(hyper)
    except UserError as error:
        # The names differ only in the prefix.
        message = str(error).replace("hyper.", "model.mem_").replace("hyper amounts", "model.mem_* amounts")
        raise UserError(f"{fields.where}: {message}") from None
    heads = fields.integer("mem_head")
    few = layer == "memory_plus" or heads <= _MOST_HEADS
    require(
        few, f"{fields.where}: model.mem_head", heads, f"must be at most {_MOST_HEADS}: they share a query"
    )
    return reference, kept


def _located(make: Callable[[], T], where: str) -> T:
    """Returns what `make` returns. Its errors name this project's fields, and say where the values came from.

    Raises:
        UserError: `make` raises one.
    """
    try:
        return make()
    except UserError as error:
        raise error if str(error).startswith(where) else UserError(f"{where} amounts to {error}") from None


class _Fields:
    """Reads single fields, with errors that name them."""

    def __init__(self, section: Mapping[str, Any], where: str):
        self.section, self.where = section, where

    def value(self, name: str) -> Any:
        """Returns the value of a field of `DEFAULTS`."""
        return self.section.get(name, DEFAULTS[name])

    def integer(self, name: str) -> int:
        """Returns an integer of at least 1."""
        value = self.value(name)
        self._require(type(value) is int and value >= 1, name, "must be an integer of at least 1")
        return int(value)

    def optional_integer(self, name: str) -> int | None:
        """Returns an integer of at least 1, or None for null."""
        return None if self.value(name) is None else self.integer(name)

    def number(self, name: str) -> float:
        """Returns a finite number of at least 0. PyYAML reads `1e-5` as a string."""
        value = self.value(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        self._require(0 <= number < math.inf, name, "must be a number of at least 0, and finite")
        return number

    def switch(self, name: str) -> bool:
        """Returns a boolean."""
        value = self.value(name)
        self._require(isinstance(value, bool), name, "must be true or false")
        return bool(value)

    def text(self, name: str, allowed: tuple[str, ...]) -> str:
        """Returns one of the allowed strings."""
        value = self.value(name)
        self._require(value in allowed, name, f"must be one of {', '.join(map(repr, allowed))}")
        return str(value)

    def num_kv_heads(self, num_heads: int) -> int:
        """Returns the heads of keys and values."""
        given, one = self.optional_integer("n_kv_heads"), self.value("multi_query_attention")
        if one is None:
            return given or num_heads
        implied = 1 if self.switch("multi_query_attention") else num_heads
        self._require(given in (None, implied), "n_kv_heads", f"multi_query_attention = {one} is {implied}")
        return implied

    def placement(self, num_layers: int) -> str:
        """Returns the placement of the memories. The authors count layers from 0, and this project from 1.

        The authors' forward pass holds one output of a memory at a time. One that has not been added when
        the next memory reads is lost. A model in which that happens is refused.
        """
        if not any(name.startswith("mem_") for name in self.section):
            return "none"  # a checkpoint of OLMo itself
        way, name = self.value("mem_insert_way"), "mem_insert_way"
        if way in ("full", "no_mem"):
            return "full" if way == "full" else "none"
        spans = []
        for part in way.split("/") if isinstance(way, str) else [""]:
            start, end = map(whole_number, part.partition(":")[::2])
            if start is None or end is None or not start <= end < num_layers:
                allowed = (
                    f"must be 'full', 'no_mem' or spans like '3:5/6:8' of layers from 0 to {num_layers - 1}"
                )
                self._require(False, name, allowed)
            else:
                spans.append((start, end))
        ordered = sorted(spans)
        for (_, end), (start, _) in itertools.pairwise(ordered):
            allowed = f"span {start}: must start after layer {end}, or what the memory before it read is lost"
            self._require(end < start, name, allowed)
        return "/".join(f"{start + 1}:{end + 1}" for start, end in spans)

    def table_parts(self, reference: Reference | None) -> int:
        """Returns P, the number of files that hold columns of the table."""
        parts, split = self.integer("mem_parallel_size"), self.switch("vertical_parallel")
        self._require(split == (parts > 1), "mem_parallel_size", f"vertical_parallel is {split}")
        if not split:
            return 1
        if reference is None or reference.layer != "v2":
            allowed = "must be false, except with mem_type 'ultramem_v2'"
            raise UserError(f"{self.where}: model.vertical_parallel = True: {allowed}")
        # The ranks are divided evenly among the cores.
        widths = reference.config.table.arrays.values()
        fits = parts % _CORES["tucker_multihead"] == 0 and all(width % parts == 0 for width in widths)
        allowed = "must be even, and divide mem_vdim and mem_pre_vdim"
        self._require(fits, "mem_parallel_size", allowed)
        return parts

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        require(condition, f"{self.where}: model.{name}", self.value(name), allowed)
