"""Reads open models from GGUF files as if they were folders of Hugging Face: config and named tensors.

The names of the tensors are those of llama.cpp, which writes and reads the files: its converters
(`conversion/` there), `gguf-py/gguf/constants.py` and `src/models/`.
"""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from ultramem_jax.errors import UserError, require
from ultramem_jax.gguf_files import GgufFile, open_gguf
from ultramem_jax.interop.gguf_config import gguf_config
from ultramem_jax.interop.stored_tensors import StoredTensors
from ultramem_jax.tree_types import JsonDict

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
    file = open_gguf(path)
    config = gguf_config(file)
    tensors = _Tensors(file)
    _add_model(tensors, config)
    tensors.require_nothing_else(config["model_type"])
    return config, GgufTensors(file, tensors.sources)


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
