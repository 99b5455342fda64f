"""Reads open models from GGUF files as if they were folders of Hugging Face: config and named tensors.

The meaning of the metadata and the names of the tensors are those of llama.cpp, which writes and reads the
files: its converters (`conversion/` there), `gguf-py/gguf/constants.py` and `src/models/`.
"""

import dataclasses
import math
import os
from collections.abc import Mapping

import numpy as np

from ultramem_jax.errors import UserError, require, unknown
from ultramem_jax.gguf_files import GgufFile, open_gguf
from ultramem_jax.interop.stored_tensors import StoredTensors
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

_EXPERT_NAMES = {
    "mixtral": {"gate": "w1", "down": "w2", "up": "w3"},
    "olmoe": {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"},
}
"""Hugging Face's names of an expert's three maps, by `model_type` and llama.cpp's names."""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclasses.dataclass(frozen=True)
class _Source:
    """Says where a tensor of Hugging Face's is: in the whole of one of the file, or in one part of it.

    Attributes:
        name: of the tensor in the file.
        shape: of Hugging Face's tensor.
        part: which slice of stacked experts it is; None for a whole tensor.
        heads: of how many heads the rows are pairs for the rotary embedding; 0 if they are in order.
    """

    name: str
    shape: tuple[int, ...]
    part: int | None = None
    heads: int = 0


class GgufTensors(StoredTensors):
    """Gives the tensors of a GGUF file under Hugging Face's names and in its layouts."""

    def __init__(self, file: GgufFile, sources: Mapping[str, _Source]) -> None:
        self._file = file
        self._sources = sources
        self._shapes = {name: source.shape for name, source in sources.items()}

    @property
    def where(self) -> str:
        """Returns the path of the file."""
        return self._file.path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by Hugging Face's name, linear maps as (out, in)."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor in the file: `float32`, `bfloat16`, or a type such as `Q4_K`."""
        stored = self._file.dtype(self._sources[name].name)
        return _DTYPES.get(stored, stored)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in host memory of its own, a quantized one as float32; no other is read.

        Raises:
            UserError: its bytes cannot be read.
        """
        source = self._sources[name]
        if source.part is not None:
            return self._file.read_part(source.name, source.part)
        stored = self._file.read(source.name)
        return _halves(stored, source.heads) if source.heads else stored


def open_gguf_model(path: str | os.PathLike[str]) -> tuple[JsonDict, StoredTensors]:
    """Opens a model in a GGUF file of the architecture `llama`, `qwen2`, `qwen3` or `olmoe`.

    Args:
        path: of the whole model in one file.

    Returns:
        config: what Hugging Face's `config.json` of the model holds, as far as a GGUF file has it. A file of
            the architecture `llama` is of the `model_type` `llama`, or `mixtral` if it has experts.
        tensors: all tensors of the model; without `lm_head.weight` where that is the embedding.

    Raises:
        UserError: as for `ultramem_jax.gguf_files.open_gguf`; the file is of another architecture, or one of
            several files of a model; its metadata ask for another computation than Hugging Face's for that
            architecture; a tensor is missing, left over, of a wrong shape, or cannot be dequantized.
    """
    metadata = _Metadata(open_gguf(path))
    config = _config(metadata)
    metadata.require_nothing_else(config)
    tensors = _Tensors(metadata.file)
    _add_model(tensors, config)
    tensors.require_nothing_else(config["model_type"])
    return config, GgufTensors(metadata.file, tensors.sources)


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
    """Returns the metadata as a `config.json`."""
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


class _Tensors:
    """Finds where Hugging Face's tensors are in a file, and so knows which of the file are left."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.sources: dict[str, _Source] = {}
        self._left = dict.fromkeys(file.shapes)

    def add(self, name: str, stored: str, shape: tuple[int, ...], heads: int = 0) -> None:
        """Adds the tensor `name`, which is `stored` in the file."""
        self.use(stored, shape)
        self.sources[name] = _Source(stored, shape, heads=heads)

    def add_parts(self, names: list[str], stored: str, shape: tuple[int, ...]) -> None:
        """Adds tensors of one shape, which are stacked in the file."""
        self.use(stored, (len(names), *shape))
        self.sources |= {name: _Source(stored, shape, part) for part, name in enumerate(names)}

    def use(self, stored: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor of the file that is missing, of another shape, or cannot be read."""
        if stored not in self.file.shapes:
            raise UserError(f"{self.file.path}: has no tensor {stored}")
        found = self.file.shapes[stored]
        require(found == shape, f"{self.file.path}: {stored}.shape", found, f"must be {shape}")
        self.file.require_floats(stored)
        self._left.pop(stored, None)

    def require_nothing_else(self, model_type: str) -> None:
        """Refuses a file with tensors that have found no use."""
        for name in self._left:
            raise UserError(f"{self.file.path}: has a tensor {name}, which {model_type} models do not have")


def _add_model(tensors: _Tensors, config: JsonDict) -> None:
    """Adds all tensors of a model."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    tensors.add("model.embed_tokens.weight", "token_embd.weight", (vocabulary, width))
    tensors.add("model.norm.weight", "output_norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        tensors.add("lm_head.weight", "output.weight", (vocabulary, width))
    if config["model_type"] in ("llama", "mixtral") and "rope_freqs.weight" in tensors.file.shapes:
        tensors.use("rope_freqs.weight", (config["head_dim"] // 2,))  # it is in `rope_scaling` now
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        tensors.add(f"{ours}.input_layernorm.weight", f"{theirs}.attn_norm.weight", (width,))
        tensors.add(f"{ours}.post_attention_layernorm.weight", f"{theirs}.ffn_norm.weight", (width,))
        _add_attention(tensors, config, f"{ours}.self_attn", theirs)
        if config["model_type"] in _EXPERT_NAMES:
            _add_experts(tensors, config, ours, theirs)
        else:
            _add_feed_forward(tensors, config, f"{ours}.mlp", theirs)


def _add_attention(tensors: _Tensors, config: JsonDict, ours: str, theirs: str) -> None:
    """Adds the projections of an attention layer, their biases and norms."""
    model_type, width, head_width = config["model_type"], config["hidden_size"], config["head_dim"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    biased = config.get("attention_bias", model_type == "qwen2")
    for letter, count in (("q", heads), ("k", key_heads), ("v", key_heads)):
        # llama.cpp rotates neighbours in this architecture, Hugging Face the halves of a head in all.
        pairs = count if letter != "v" and model_type in ("llama", "mixtral") else 0
        name, stored, rows = f"{ours}.{letter}_proj", f"{theirs}.attn_{letter}", count * head_width
        tensors.add(f"{name}.weight", f"{stored}.weight", (rows, width), pairs)
        if biased:
            tensors.add(f"{name}.bias", f"{stored}.bias", (rows,), pairs)
        normed = {"qwen3": head_width, "olmoe": rows}.get(model_type)
        if normed and letter != "v":
            tensors.add(f"{ours}.{letter}_norm.weight", f"{stored}_norm.weight", (normed,))
    tensors.add(f"{ours}.o_proj.weight", f"{theirs}.attn_output.weight", (width, heads * head_width))
    if biased and model_type != "qwen2":
        tensors.add(f"{ours}.o_proj.bias", f"{theirs}.attn_output.bias", (width,))


def _maps(config: JsonDict) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the three maps of a feed-forward layer, or of an expert."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    return {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}


def _add_feed_forward(tensors: _Tensors, config: JsonDict, ours: str, theirs: str) -> None:
    """Adds a dense feed-forward layer."""
    for kind, shape in _maps(config).items():
        tensors.add(f"{ours}.{kind}_proj.weight", f"{theirs}.ffn_{kind}.weight", shape)
        if config.get("mlp_bias"):
            tensors.add(f"{ours}.{kind}_proj.bias", f"{theirs}.ffn_{kind}.bias", shape[:1])


def _add_experts(tensors: _Tensors, config: JsonDict, ours: str, theirs: str) -> None:
    """Adds a layer of experts: stacked in a tensor for each map, or, in old files, one by one."""
    model_type, width = config["model_type"], config["hidden_size"]
    count = config["num_local_experts" if model_type == "mixtral" else "num_experts"]
    layer = f"{ours}.block_sparse_moe" if model_type == "mixtral" else f"{ours}.mlp"
    # It comes first, as its shape confirms the number of experts for which names are made.
    tensors.add(f"{layer}.gate.weight", f"{theirs}.ffn_gate_inp.weight", (count, width))
    for kind, shape in _maps(config).items():
        names = [f"{layer}.experts.{x}.{_EXPERT_NAMES[model_type][kind]}.weight" for x in range(count)]
        if f"{theirs}.ffn_{kind}.0.weight" in tensors.file.shapes:
            for x, name in enumerate(names):
                tensors.add(name, f"{theirs}.ffn_{kind}.{x}.weight", shape)
        else:
            tensors.add_parts(names, f"{theirs}.ffn_{kind}_exps.weight", shape)


def _halves(pairs: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows (heads · d, …) whose heads are pairs of neighbours as heads of two halves.

    Row 2i of a head becomes its row i, and row 2i + 1 its row i + d/2.
    """
    split = pairs.reshape(heads, -1, 2, *pairs.shape[1:])
    return split.swapaxes(1, 2).reshape(pairs.shape)


def _short(value: object) -> object:
    """Returns a value for a message, of a list or string only the beginning."""
    return value[:80] if isinstance(value, str) else value[:8] if isinstance(value, list) else value
