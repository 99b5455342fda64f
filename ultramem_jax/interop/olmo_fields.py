"""Lists the fields of a model in the config of an OLMo checkpoint, with what this project makes of them."""

from collections.abc import Mapping
from typing import Any

from ultramem_jax.errors import require, unknown
from ultramem_jax.tree_types import JsonDict

DEFAULTS: JsonDict = dict(
    d_model=768,
    n_heads=12,
    n_kv_heads=None,
    multi_query_attention=None,
    n_layers=12,
    mlp_ratio=4,
    mlp_hidden_size=None,
    block_type="sequential",
    rope_theta=10_000,
    attention_layer_norm=False,
    layer_norm_eps=1e-5,
    max_sequence_length=1024,
    vocab_size=50_257,
    embedding_size=50_304,
    weight_tying=True,
    moe_num_experts=8,
    moe_top_k=2,
    moe_loss_weight=0.1,
    moe_zloss_weight=None,
    mem_type="ultramem_v2",
    mem_insert_way="full",
    mem_knum=128,
    mem_kdim=512,
    mem_vdim=512,
    mem_knn=16,
    mem_head=1,
    mem_share_ratio=1.0,
    mem_value_expand_time=1,
    mem_key_expand_time=1,
    mem_pre_vdim=512,
    mem_key_balance_reg_coef=0.0,
    mem_q_for_each_tucker_rank=False,
    mem_use_glu_act=False,
    vertical_parallel=False,
    mem_parallel_size=1,
)
"""Fields that this module reads, with the defaults of the authors' code."""

_FIXED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "activation_type": ("swiglu", ("swiglu",), "must be 'swiglu'"),
    "alibi": (False, (False,), "must be false: positions are rotary"),
    "attention_layer_norm_with_affine": (True, (True,), "must be true: the norms have gains"),
    "bias_for_layer_norm": (None, (None, False), "must be false: norms have no bias"),
    "block_group_size": (1, (1,), "must be 1: the authors' code has no memories in groups"),
    "clip_qkv": (None, (None,), "must be null: nothing is clipped"),
    "embedding_layer_norm": (False, (False,), "must be false: embeddings have no norm"),
    "include_bias": (True, (False,), "must be false: linear maps have no bias"),
    "layer_norm_type": ("default", ("rms",), "must be 'rms'"),
    "layer_norm_with_affine": (True, (True,), "must be true: the norms have gains"),
    "mem_final_top_expand_time": (1, (1,), "must be 1: nothing in the authors' release reads it"),
    "moe_interleave": (False, (False, None), "must be false: all layers have the same feed-forward"),
    "norm_after": (False, (False,), "must be false: norms come before attention and the feed-forward"),
    "rope": (False, (True,), "must be true: positions are rotary"),
    "scale_logits": (False, (False,), "must be false: logits are not scaled"),
}
"""Fields with one meaning here: the default of the authors' code, the values with that meaning, and what an
error says."""

_FIXED_OF_MOE: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "moe_dropless": (True, (True,), "must be true: no expert drops a token"),
    "moe_shared_expert": (False, (False, None), "must be false: every expert is routed"),
}

_IGNORED = frozenset(
    (
        "alibi_bias_max",
        "rope_full_precision",
        "flash_attention",
        "attention_dropout",
        "residual_dropout",
        "embedding_dropout",
        "eos_token_id",
        "pad_token_id",
        "init_device",
        "init_fn",
        "init_std",
        "init_cutoff_factor",
        "precision",
        "moe_mlp_impl",
        "moe_log_expert_assignment",
        "moe_lbl_in_fp32",
        "moe_capacity_factor",
        "scale_emb_init",
        "emb_init_std",
        "convert2fp32",
        "mem_tucker_rank_penalty",
        "mem_log_interval",
        "mem_output_dropout_rate",
    )
)
"""Fields that do not change the logits in float32."""

_KNOWN = frozenset(DEFAULTS) | frozenset(_FIXED) | frozenset(_FIXED_OF_MOE) | _IGNORED


def check_section(section: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` for a field that is unknown, or whose value this project does not compute.

    Args:
        section: the fields, see `olmo_config.read_section`.
        where: path of the file, for messages.
    """
    for name in section:
        if name not in _KNOWN:
            raise unknown(f"field in {where}: model", str(name), _KNOWN)
    moe = section.get("block_type") == "moe"
    for name, (default, values, allowed) in (_FIXED | (_FIXED_OF_MOE if moe else {})).items():
        value = section.get(name, default)
        right = any(type(value) is type(one) and value == one for one in values)
        require(right, f"{where}: model.{name}", value, allowed)
