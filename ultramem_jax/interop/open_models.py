"""Loads open models into a `Transformer`, and writes models in the form in which open models come.

    config, variables = load("SmolLM2-135M")          # a folder of Hugging Face, or a .gguf file
    logits = Transformer(config).apply(variables, ids)
    save("again", config, variables)

Folders hold `config.json` and one or several `.safetensors` files; `hf_config.FAMILIES` lists the families of
models. Files are GGUF, of any type of weights that the package `gguf` decodes. Whole checkpoints of the
UltraMem authors' OLMoE code load as well (`olmo_checkpoints`). Models with memories are written under names
of this project (`hf_names`), and load again.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.data import BpeTokenizer, ByteTokenizer, FileTokenizer, Tokenizer
from ultramem_jax.data.file_tokenizers import save_settings
from ultramem_jax.data.tokenizer_files import TOKENIZER_FILE
from ultramem_jax.data.tokenizers import EOS_TOKEN, require_vocabulary
from ultramem_jax.errors import UserError, choice, require
from ultramem_jax.gguf_files import open_gguf
from ultramem_jax.interop import hf_config, hf_folder
from ultramem_jax.interop.entries import Entry, check_index, compare_names
from ultramem_jax.interop.gguf_models import open_gguf_model
from ultramem_jax.interop.hf_fields import BYTES
from ultramem_jax.interop.hf_names import entries
from ultramem_jax.interop.olmo_checkpoints import is_olmo_checkpoint, load_olmo, read_olmo_config
from ultramem_jax.interop.safetensors_stream import TensorToWrite
from ultramem_jax.interop.stored_tensors import StoredTensors
from ultramem_jax.nested import at, leaves, put
from ultramem_jax.tree_types import ArrayTree, JsonDict

__all__ = ["load", "read_config", "save", "tokenizer_of"]

SHARD_BYTES = 5 * 10**9
"""Most bytes of a file that `save` writes, unless it is told otherwise: as in most open models."""
_DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of stored weights, and of saved ones."""


def load(
    path: str | os.PathLike[str],
    dtype: str | None = None,
    *,
    ignore: Collection[str] = (),
) -> tuple[ModelConfig, dict[str, ArrayTree]]:
    """Loads a model: its config, and the variables with which `Transformer(config)` computes it.

    Tensors are read one by one, and only when the config, all names and all shapes are known to be right. So
    host memory holds the model and about two tensors more.

    Args:
        path: a folder of Hugging Face or of the UltraMem authors' code, or a `.gguf` file.
        dtype: dtype of the computation, and of all variables but those of memories. With None variables keep
            the dtype of the file (float32 if the file has quantised ones), and the computation is in float32.
        ignore: fields of `config.json` that would be refused as unknown, and do not change the model.

    Returns:
        The config, and `params`, `memory` and `buffers` on the first device.

    Raises:
        UserError: the path is no such model; the config asks for what is not computed here, or contradicts
            the tensors; a file is broken; a tensor is missing, unknown, misshapen or of another dtype.
    """
    if dtype is not None:
        choice("dtype", dtype, ("float32", "bfloat16"))
    path, computed = Path(path), cast(Literal["float32", "bfloat16"] | None, dtype)
    if is_olmo_checkpoint(path):
        config, of_olmo = load_olmo(path, computed)
        return config, dict(of_olmo)
    tree, where, tensors = _opened(path)
    config = hf_config.model_config(tree, where, ignore)
    if computed is not None:
        config = dataclasses.replace(config, dtype=computed)
    if config.moe is not None:  # before a list of so many names is made
        allowed = f"must be at most the {len(tensors.shapes):,} tensors of {tensors.where}"
        number = config.moe.num_experts
        require(number <= len(tensors.shapes), f"{where}: number of experts", number, allowed)
    expected = entries(config, hf_config.expert_names(tree["model_type"]))
    _check(expected, tensors, config.tie_embeddings)
    variables: dict[str, ArrayTree] = {"params": {}, "memory": {}, "buffers": {}}
    for entry in expected:
        wanted = dtype if _is_of_layers(config, entry) else None
        put(variables, entry.path, _read(entry, tensors, wanted))
    return config, variables


def read_config(path: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> ModelConfig:
    """Returns the config that `load` returns, without reading the tensors.

    Arguments and errors are those of `load`.
    """
    path = Path(path)
    if is_olmo_checkpoint(path):
        return read_olmo_config(path)
    tree, where, _ = _opened(path)
    return hf_config.model_config(tree, where, ignore)


def tokenizer_of(path: str | os.PathLike[str]) -> str | None:
    """Returns what `DataConfig.tokenizer` must be for a model: its own path or `bytes`, None if not known.

    Raises:
        UserError: the path is a file, and no GGUF file; or its config is broken.
    """
    path = Path(path)
    if not path.is_dir():
        return str(path) if "tokenizer.ggml.model" in open_gguf(path).fields else None
    if (path / TOKENIZER_FILE).is_file():
        return str(path)
    config = path / hf_folder.CONFIG
    return "bytes" if config.is_file() and hf_folder.read_json(config).get(BYTES) is True else None


def save(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    variables: Mapping[str, ArrayTree],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model in Hugging Face's form: `config.json` and one or several `.safetensors` files.

    A model that a family of Hugging Face computes is written as that family (Mistral as Llama, which is the
    same). Others, such as models with memories, are written as `ultramem_jax`, which only this project reads.
    Tensors are written one by one. The folder appears whole or not at all.

    Args:
        folder: the folder, which must be new or empty.
        config: the model.
        variables: its `params`, `memory` and `buffers`, as `load` and `training.restore.load_model` return
            them.
        tokenizer: written beside the model, so that `data.open_tokenizer` opens the folder. Bytes as tokens
            need no file, only a field of the config.
        dtype: dtype of all tensors but those of memories: `float32`, `float16` or `bfloat16`. None keeps
            that of each variable, so that what was loaded without a dtype is written bit for bit.
        shard_bytes: most bytes of a file.

    Raises:
        UserError: the folder is in use or cannot be written; a variable is missing, extra or misshapen.
    """
    if dtype is not None:
        choice("dtype", dtype, _DTYPES)
    model_type = hf_config.family_of(config)
    tensors: dict[str, TensorToWrite] = {}
    expected = entries(config, hf_config.expert_names(model_type))
    given = ["/".join(path) for path, _ in leaves(variables)]
    compare_names(given, ["/".join(entry.path) for entry in expected], "variables", "the config's model does")
    for entry in expected:
        variable = _variable(variables, entry)
        stored = entry.part(np.empty(entry.variable_shape, variable.dtype), 0).dtype
        if dtype is not None and _is_of_layers(config, entry):
            stored = jnp.dtype(dtype)
        for index, name in enumerate(entry.names):
            tensors[name] = _to_write(entry, variable, index, stored)
    dtypes = {tensor.dtype.name for tensor in tensors.values() if jnp.issubdtype(tensor.dtype, jnp.floating)}
    tree = hf_config.hf_tree(config, "float32" if "float32" in dtypes else min(dtypes))
    if tokenizer is not None:
        require_vocabulary(tokenizer, config.vocab_size, "tokenizer")
        tree |= {"bos_token_id": tokenizer.start_ids[0], "eos_token_id": tokenizer.eos_id}
        tree |= {BYTES: True} if isinstance(tokenizer, ByteTokenizer) else {}
    with hf_folder.new_folder(Path(folder)) as new:
        hf_folder.write_folder(new, tree, tensors, shard_bytes)
        if isinstance(tokenizer, BpeTokenizer):
            tokenizer.save(new / TOKENIZER_FILE)
            save_settings(new, EOS_TOKEN)
        elif isinstance(tokenizer, FileTokenizer):
            tokenizer.save(new)


def _opened(path: Path) -> tuple[JsonDict, str, StoredTensors]:
    """Returns a config in Hugging Face's form, where it stands, and the tensors."""
    if path.is_dir():
        file = path / hf_folder.CONFIG
        require(
            file.exists(), "model", str(path), f"must be a folder with {hf_folder.CONFIG}, or a .gguf file"
        )
        return hf_folder.read_json(file), str(file), hf_folder.FolderTensors(path)
    require(path.exists(), "model", str(path), "must be a folder or a .gguf file, and there is none")
    if path.suffix == ".safetensors":
        raise UserError(f"model = {str(path)!r}: must be the folder, which also has {hf_folder.CONFIG}")
    tree, tensors = open_gguf_model(path)
    return tree, str(path), tensors


def _is_of_layers(config: ModelConfig, entry: Entry) -> bool:
    """Tells whether a variable is a dense parameter of the layers, embeddings or output, not of a memory."""
    return entry.path[0] == "params" and entry.path[1] not in {site.name for site in config.sites}


def _check(expected: Collection[Entry], tensors: StoredTensors, tied: bool) -> None:
    """Refuses tensors that are missing, unknown, misshapen or of a dtype without floats."""
    shapes, where = tensors.shapes, tensors.where
    given = [name for name in shapes if not _needless(name, tied)]
    compare_names(
        given, [name for entry in expected for name in entry.names], where, "a model of its config does"
    )
    if tied and "lm_head.weight" in shapes:
        output, embedding = (tensors.read(f"{of}.weight") for of in ("lm_head", "model.embed_tokens"))
        same = np.array_equal(output, embedding)
        contradicts = "must be False: lm_head.weight is not the embedding"
        require(same, f"{where}: tie_word_embeddings", tied, contradicts)
    for entry in expected:
        for name in entry.names:
            shape = shapes[name]
            require(shape == entry.shape, f"{where}: {name}.shape", shape, f"must be {entry.shape}")
            dtype = tensors.dtype(name)
            alike = _read_as(dtype) == _read_as(tensors.dtype(entry.names[0]))
            require(alike, f"{where}: {name}.dtype", dtype, f"must be that of {entry.names[0]}")
            if entry.constant:
                require("int" in dtype, f"{where}: {name}.dtype", dtype, "must be one of integers")
            else:
                allowed = f"must be {', '.join(_DTYPES)} or a quantised one of GGUF"
                quantised = dtype.upper() == dtype and dtype.isascii() and not dtype.startswith("I")
                require(dtype in _DTYPES or quantised, f"{where}: {name}.dtype", dtype, allowed)


def _read_as(dtype: str) -> str:
    """Returns the dtype in which a stored dtype is read: quantised weights become float32."""
    return dtype if dtype in _DTYPES or "int" in dtype else "float32"


def _needless(name: str, tied: bool) -> bool:
    """Tells whether a tensor says nothing new: rotary frequencies, or the tied output once more."""
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _read(entry: Entry, tensors: StoredTensors, dtype: str | None) -> jax.Array:
    variable = entry.pack(tensors.read(name) for name in entry.names)
    if entry.index:
        check_index(variable, entry.limit, f"{tensors.where}: {entry.names[0]}")
    if dtype is not None:
        variable = variable.astype(jnp.dtype(dtype))
    return jnp.asarray(variable)


def _variable(variables: Mapping[str, Any], entry: Entry) -> Any:
    found = at(variables, entry.path)
    shape = np.shape(found)
    allowed = f"must be {entry.variable_shape}, as in the config's model"
    require(shape == entry.variable_shape, f"variables: {'/'.join(entry.path)}.shape", shape, allowed)
    return found


def _to_write(entry: Entry, variable: Any, index: int, dtype: np.dtype) -> TensorToWrite:
    return TensorToWrite(
        dtype, entry.shape, lambda: entry.part(np.asarray(variable), index).astype(dtype, copy=False)
    )
