"""Converts between a Hugging Face `config.json` and a `ModelConfig`.

A config that another program wrote is of one of the `FAMILIES`. A model that fits one of them is written as
that family; any other, such as one with memories, as the family `ultramem_jax`, whose config holds all fields
of its `ModelConfig`.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

from ultramem_jax.config import ModelConfig, MoEConfig, RopeScalingConfig, model_config_from_dict, to_dict
from ultramem_jax.errors import UserError, unknown
from ultramem_jax.interop.hf_fields import Fields
from ultramem_jax.interop.hf_names import EXPERTS, MIXTRAL_EXPERTS, ExpertNames
from ultramem_jax.tree_types import JsonDict

T = TypeVar("T")

OWN_FAMILY = "ultramem_jax"
"""Value of `model_type` in configs of models that no family of Hugging Face has; also the field that holds
the `ModelConfig`."""
_FORMAT = 1
_NO_WINDOW = "must be null: a Mistral without the field has a window of 4,096 tokens"


class Family(NamedTuple):
    """Describes a `model_type` of Hugging Face: what its code does unless the config says otherwise."""

    architecture: str
    norm_eps: float = 1e-6
    qk_norm: str = "none"
    qkv_bias: bool = False
    """Whether queries, keys and values always have biases."""
    rope_theta: float = 10_000.0
    experts: ExpertNames | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="per_head"),
    "olmoe": Family("OlmoeForCausalLM", norm_eps=1e-5, qk_norm="all_heads", experts=EXPERTS),
    "mixtral": Family("MixtralForCausalLM", norm_eps=1e-5, rope_theta=1e6, experts=MIXTRAL_EXPERTS),
}
_BIASED = ("llama", "qwen3", "olmoe")
"""Families whose `attention_bias` puts biases on all four projections."""
_OWN_HEAD_DIM = ("llama", "mistral", "qwen3", "mixtral")
"""Families with a field for the width of a head."""


def expert_names(model_type: str) -> ExpertNames:
    """Returns the names that a `model_type` has for the tensors of experts."""
    family = FAMILIES.get(model_type)
    return EXPERTS if family is None or family.experts is None else family.experts


def model_config(tree: JsonDict, where: str, ignore: Collection[str] = ()) -> ModelConfig:
    """Returns the model that a config describes; its `dtype` is `float32`.

    Args:
        tree: contents of `config.json`.
        where: path of the file, for messages.
        ignore: fields that would be refused as unknown, and do not matter.

    Raises:
        UserError: the config asks for something that is not computed here, or lacks a field.
    """
    fields = Fields(tree, where)
    model_type = fields.of("model_type", str)
    if model_type == OWN_FAMILY:
        return _own(fields)
    if model_type not in FAMILIES:
        raise unknown(f"{where}: model_type", model_type, [*FAMILIES, OWN_FAMILY])
    family = FAMILIES[model_type]
    found = _model(fields, model_type, family)
    fields.refuse_others(ignore)
    return _made(where, ModelConfig, found)


def _made(where: str, kind: Callable[..., T], values: dict[str, Any]) -> T:
    """Returns a config of a kind; its errors, which name fields of this project, say where they come from."""
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where} amounts to {error}") from None


def _model(fields: Fields, model_type: str, family: Family) -> dict[str, Any]:
    width, heads = fields.of("hidden_size", int), fields.of("num_attention_heads", int)
    theta, scaling = _rope(fields, family)
    bias = "qkv" if family.qkv_bias else "none"
    if model_type in _BIASED:
        bias = "all" if fields.of("attention_bias", bool, False) else "none"
    else:
        fields.only("attention_bias", family.qkv_bias)
    if fields.of("use_sliding_window", bool, not model_type.startswith("qwen")):
        fields.require(model_type != "mistral" or fields.has("sliding_window"), "sliding_window", _NO_WINDOW)
        fields.only("sliding_window", None)
    else:
        fields.of("sliding_window", int, None)
    head_dim = fields.of("head_dim", int, 128 if model_type == "qwen3" else 0)
    inner = fields.of("intermediate_size", int)
    return dict(
        vocab_size=fields.of("vocab_size", int),
        embed_dim=width,
        num_layers=fields.of("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=fields.of("num_key_value_heads", int, heads),
        head_dim=0 if head_dim * heads == width else head_dim,
        attention_qk_norm=family.qk_norm,
        attention_bias=bias,
        mlp="swiglu",
        mlp_dim=inner,
        moe=_moe(fields, model_type, inner) if family.experts else None,
        tie_embeddings=fields.of("tie_word_embeddings", bool, False),
        rope_theta=theta,
        rope_scaling=scaling,
        max_length=fields.of("max_position_embeddings", int, 0),
        norm_eps=fields.of("rms_norm_eps", float, family.norm_eps),
    )


def _moe(fields: Fields, model_type: str, inner: int) -> MoEConfig:
    top_k = fields.of("num_experts_per_tok", int)
    normalize = True if model_type == "mixtral" else fields.of("norm_topk_prob", bool, False)
    number = fields.of("num_local_experts" if model_type == "mixtral" else "num_experts", int)
    # There the loss counts assignments per token; here it counts shares of the k assignments. No family has
    # a z-loss.
    weight = top_k * fields.of("router_aux_loss_coef", float, 0.0)
    values = dict(
        num_experts=number,
        top_k=top_k,
        expert_dim=inner,
        activation="swiglu",
        normalize_gates=normalize,
        load_balance_weight=weight,
        router_z_weight=0.0,
        auxiliary_over_layers="mean",
    )
    return _made(fields.where, MoEConfig, values)


def _rope(fields: Fields, family: Family) -> tuple[float, RopeScalingConfig | None]:
    """Returns base and scaling of the rotary frequencies, from the fields of either version of transformers.

    Version 5 has `rope_parameters`, earlier ones have `rope_theta` and `rope_scaling`. Both may be there.
    """
    theta, scaling = fields.of("rope_theta", float, None), None
    for name in ("rope_scaling", "rope_parameters"):
        if name in fields:
            rope = fields.inner(name)
            same = rope.of("rope_theta", float, theta)
            rope.require(theta in (None, same), "rope_theta", f"must be the rope_theta beside it, {theta}")
            found = _scaling(rope)
            allowed = "must scale as rope_scaling does"
            fields.require(scaling in (None, found), name, allowed)
            theta, scaling = same, found
    return family.rope_theta if theta is None else theta, scaling


def _scaling(rope: Fields) -> RopeScalingConfig | None:
    name = "rope_type" if "rope_type" in rope else "type"  # the older name
    kind = rope.of(name, str, "default")
    rope.require(kind in ("default", "llama3"), name, "must be 'default' or 'llama3'")
    scaling = None
    if kind == "llama3":
        values = {name: rope.of(name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        values["original_length"] = rope.of("original_max_position_embeddings", int)
        scaling = _made(rope.where, RopeScalingConfig, values)
    rope.of("type", str, None)
    rope.refuse_others()
    return scaling


def _own(fields: Fields) -> ModelConfig:
    own = fields.inner(OWN_FAMILY)
    own.only("format", _FORMAT)
    return model_config_from_dict(own.of("model", dict))


def hf_tree(config: ModelConfig, dtype: str) -> JsonDict:
    """Returns the `config.json` of a model.

    Args:
        config: the model.
        dtype: dtype of its tensors, for readers that want to know it before they read them.
    """
    model_type = family_of(config)
    if model_type == OWN_FAMILY:
        return {
            "model_type": OWN_FAMILY,
            "architectures": ["Transformer"],
            "dtype": dtype,
            "vocab_size": config.vocab_size,
            OWN_FAMILY: {"format": _FORMAT, "model": to_dict(config)},
        }
    moe, scaling = config.moe, config.rope_scaling
    rope: JsonDict = {"rope_type": "default", "rope_theta": float(config.rope_theta)}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    tree: JsonDict = {
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].architecture],
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim if moe is None else moe.expert_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        # Version 5 of transformers reads `rope_parameters`, earlier ones the two other fields.
        "rope_parameters": rope,
        "rope_theta": float(config.rope_theta),
        "rope_scaling": None if scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
    }
    if config.max_length:
        tree["max_position_embeddings"] = config.max_length
    if model_type in _OWN_HEAD_DIM:
        tree["head_dim"] = config.head_width
    if model_type in _BIASED:
        tree["attention_bias"] = config.attention_bias == "all"
    if moe is not None:
        tree |= {
            "num_local_experts" if model_type == "mixtral" else "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.load_balance_weight / moe.top_k,
        }
        of_family: dict[str, JsonDict] = {
            "mixtral": {"sliding_window": None},
            "olmoe": {"norm_topk_prob": moe.normalize_gates},
        }
        tree |= of_family[model_type]
    return tree


def family_of(config: ModelConfig) -> str:
    """Returns the `model_type` that computes a model, or `ultramem_jax` if no family of Hugging Face does."""
    if config.memories:
        return OWN_FAMILY
    moe, norm, bias = config.moe, config.attention_qk_norm, config.attention_bias
    if config.embed_dim % config.num_heads:  # which all families require, whatever the width of a head
        return OWN_FAMILY
    whole = config.query_width == config.embed_dim
    if moe is not None:
        plain = moe.activation == "swiglu" and whole
        if plain and norm == "all_heads" and bias in ("none", "all"):
            return "olmoe"
        if moe.activation == "swiglu" and norm == "none" and bias == "none" and moe.normalize_gates:
            return "mixtral"
        return OWN_FAMILY
    kinds = {("none", "none"): "llama", ("none", "all"): "llama", ("none", "qkv"): "qwen2"}
    kinds |= {("per_head", "none"): "qwen3", ("per_head", "all"): "qwen3"}
    family = kinds.get((norm, bias), OWN_FAMILY)
    return OWN_FAMILY if config.mlp != "swiglu" or (family == "qwen2" and not whole) else family
