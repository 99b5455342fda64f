"""Converts the metadata of a GGUF file to a Hugging Face `config.json`.

The meaning of the metadata is that of llama.cpp, which writes and reads the files: its converters
(`conversion/` there), `gguf-py/gguf/constants.py` and `src/models/`.
"""

import math

import numpy as np

from ultramem_jax.errors import UserError, require, unknown
from ultramem_jax.gguf_files import GgufFile
from ultramem_jax.tree_types import JsonDict

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Classes of Hugging Face by `model_type`. Mixtral's architecture in a GGUF file is `llama`, with experts."""

_ARCHITECTURES = ("llama", "olmoe", "qwen2", "qwen3")

_WITHOUT_EFFECT = {
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
}
"""Metadata that llama.cpp does not compute with in these architectures; the embedding has the vocabulary."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # 1 is a softmax over all experts, 0 the architecture's own choice
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (1,),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.type": ("none",),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
"""Metadata that may be there only with values that change nothing."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Llama 3.1's parameters of `rope_scaling` that a GGUF file does not store; its factor can be read."""


def gguf_config(file: GgufFile) -> JsonDict:
    """Returns the `config.json` of a model in a GGUF file, as far as the file has what it holds.

    Args:
        file: a whole model of the architecture `llama`, `qwen2`, `qwen3` or `olmoe`.

    Raises:
        UserError: the file is of another architecture, or one of several files of a model; its metadata ask
            for another computation than Hugging Face's for that architecture, or contradict each other.
    """
    metadata = _Metadata(file)
    config = _config(metadata)
    metadata.require_nothing_else(config)
    return config


class _Metadata:
    """Takes the metadata of the architecture one by one, and so knows which are left."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        kind, parts = file.fields.get("general.type", "model"), file.fields.get("split.count", 1)
        require(kind == "model", f"{file.path}: general.type", _short(kind), "must be 'model'")
        merge = "must be 1: merge the files of the model, by llama-gguf-split --merge"
        require(parts in (0, 1), f"{file.path}: split.count", _short(parts), merge)
        if "general.architecture" not in file.fields:
            raise UserError(f"{file.path}: has no general.architecture")
        self.architecture = str(_short(file.fields["general.architecture"]))
        if self.architecture not in _ARCHITECTURES:
            error = unknown("general.architecture", self.architecture, _ARCHITECTURES)
            raise UserError(f"{file.path}: {error}")
        self._prefix = f"{self.architecture}."
        self._left = {key for key in file.fields if key.startswith(self._prefix)}

    def name(self, key: str) -> str:
        """Returns the name of a key for messages."""
        return f"{self.file.path}: {self._prefix}{key}"

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number; a list, with a number for each layer, must hold the same one for all."""
        value = self._take(key, default)
        if isinstance(value, list) and value:
            same = all(item == value[0] for item in value)
            require(same, self.name(key), _short(value), "must be the same for all layers")
            value = value[0]
        whole = type(value) is int and value >= least
        require(whole, self.name(key), _short(value), f"must be a whole number of at least {least}")
        assert isinstance(value, int)
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Returns a positive number, as the shortest decimal that rounds to the float32 which is stored."""
        value = self._take(key, default)
        number = float(value) if isinstance(value, int | float) else math.nan
        require(1e-30 < number < 1e30, self.name(key), _short(value), "must be a number in (1e-30, 1e30)")
        return float(str(np.float32(number)))

    def require_nothing_else(self, config: JsonDict) -> None:
        """Refuses metadata that have not been taken and would change the computation."""
        known = _NEUTRAL | {  # llama.cpp reads neither of these for these architectures
            "expert_feed_forward_length": (0, config["intermediate_size"]),
            "expert_weights_norm": (config["model_type"] == "mixtral",),
        }
        for key in sorted(self._left):
            suffix, value = key.removeprefix(self._prefix), self.file.fields[key]
            if suffix not in _WITHOUT_EFFECT:
                allowed = known.get(suffix, ())
                only = f"must be {' or '.join(map(repr, allowed))}" if allowed else "must not be there"
                right = any(value == one for one in allowed)
                require(right, self.name(suffix), _short(value), f"{only}: no other computation is known")

    def _take(self, key: str, default: float | None) -> object:
        self._left.discard(self._prefix + key)
        value = self.file.fields.get(self._prefix + key, default)
        if value is None:
            raise UserError(f"{self.file.path}: has no {self._prefix}{key}")
        return value


def _config(metadata: _Metadata) -> JsonDict:
    shapes, fields = metadata.file.shapes, metadata.file.fields
    layers, width = metadata.count("block_count"), metadata.count("embedding_length")
    # Names are made for all layers: a broken count must not be a large one.
    most = f"the file has only {len(shapes)} tensors"
    require(layers <= len(shapes), metadata.name("block_count"), layers, most)
    heads = metadata.count("attention.head_count")
    key_heads = metadata.count("attention.head_count_kv", heads)
    divides = f"must divide attention.head_count = {heads}"
    require(heads % key_heads == 0, metadata.name("attention.head_count_kv"), key_heads, divides)
    head_width = _head_width(metadata, width, heads)
    theta = metadata.positive("rope.freq_base", 10000.0)
    tokens = {f"{token}_token_id": fields.get(f"tokenizer.ggml.{token}_token_id") for token in ("bos", "eos")}
    return {
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_width,
        "rms_norm_eps": metadata.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(metadata, theta, head_width),
        "max_position_embeddings": metadata.count("context_length"),
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "tie_word_embeddings": "output.weight" not in shapes,
        **{name: token for name, token in tokens.items() if isinstance(token, int)},
        **_of_model_type(metadata),
    }


def _of_model_type(metadata: _Metadata) -> JsonDict:
    """Returns the fields of a config that only some types of models have."""
    architecture, shapes = metadata.architecture, metadata.file.shapes
    experts = metadata.count("expert_count", 0, least=0)
    chosen = metadata.count("expert_used_count", 0, least=0)
    if architecture in ("qwen2", "qwen3"):
        require(experts == 0, metadata.name("expert_count"), experts, "must be 0")
    elif architecture == "olmoe":
        require(experts > 0, metadata.name("expert_count"), experts, "must be at least 1")
    few = f"must be in [{min(1, experts)}, {experts}], which is expert_count"
    require(min(1, experts) <= chosen <= experts, metadata.name("expert_used_count"), chosen, few)
    model_type = "mixtral" if architecture == "llama" and experts else architecture
    config: JsonDict = {"model_type": model_type, "architectures": [_CLASSES[model_type]]}
    # Either all maps have a bias or none: a file with some of them lacks the others.
    biased = [name for name in shapes if name.startswith("blk.0.") and name.endswith(".bias")]
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = any(".attn_" in name for name in biased)
    if model_type == "llama":
        config["mlp_bias"] = any(".ffn_" in name for name in biased)
    if model_type == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": chosen}
    if model_type == "olmoe":
        config |= {"num_experts": experts, "num_experts_per_tok": chosen, "norm_topk_prob": False}
    return config


def _head_width(metadata: _Metadata, width: int, heads: int) -> int:
    """Returns the width of a head, which keys, values and the rotary embedding share."""
    quotient, rest = divmod(width, heads)
    head_width = metadata.count("attention.key_length", None if rest else quotient)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = metadata.count(key, head_width)
        require(other == head_width, metadata.name(key), other, f"must be {head_width}, the width of a head")
    require(head_width % 2 == 0, metadata.name("attention.key_length"), head_width, "must be even")
    if metadata.architecture == "olmoe":  # whose norms of queries span the width of the model
        allowed = f"must be {width} / {heads}, the width of the model by its heads"
        right = head_width * heads == width
        require(right, metadata.name("attention.key_length"), head_width, allowed)
    return head_width


def _rope_scaling(metadata: _Metadata, theta: float, head_width: int) -> JsonDict | None:
    """Returns `rope_scaling` of Llama 3.1, recovered from the divisors of the frequencies in the file.

    The formula is that of `_compute_llama3_parameters` in Hugging Face's `modeling_rope_utils.py`.
    """
    file, name = metadata.file, "rope_freqs.weight"
    if metadata.architecture != "llama" or name not in file.shapes:
        return None
    shape = file.shapes[name]
    require(shape == (head_width // 2,), f"{file.path}: {name}.shape", shape, f"must be ({head_width // 2},)")
    divisors = file.read(name).astype(np.float64)
    factor = float(np.max(divisors))
    low, high, context = _LLAMA3.values()
    turns = context * theta ** (-np.arange(0, head_width, 2) / head_width) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    # Rounded by the converter in float32, they differ by up to 6e-7.
    right = 1 <= factor < math.inf and np.allclose(divisors * ((1 - smooth) / factor + smooth), 1, 1e-5, 0)
    of_llama3 = f"must be Llama 3.1's divisors of frequencies for {_LLAMA3}"
    require(bool(right), f"{file.path}: {name}", _short(divisors.tolist()), of_llama3)
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3} if factor > 1 else None


def _short(value: object) -> object:
    """Returns a value for a message, of a list or string only the beginning."""
    return value[:80] if isinstance(value, str) else value[:8] if isinstance(value, list) else value
