"""Loads whole models that the UltraMem authors' code, which is built on OLMo, has saved.

    config, variables = load_olmo("step1000-unsharded")
    logits = Transformer(config).apply(variables, ids)

A checkpoint is a folder with `config.yaml` and `model.safetensors`, as the authors' `scripts/unshard.py` and
`scripts/convert_pt_to_safetensors.py` write them. Names of tensors may be plain or in OLMo's encoding. With
`vertical_parallel`, the ranks have folders of their own, `rank_0` and so on, with columns of the tables.

Known are dense models with memories of UltraMem, UltraMemV2 and Memory+, and dense models and Mixtures of
Experts (dropless, of megablocks) without memory. In the authors' code a Mixture of Experts has no memories.
Checkpoints of OLMo and OLMoE themselves are read too, where they use no other parts.

Two differences from the authors' code remain:

- They choose candidates by the leading singular vectors in the buffers, which belong to the Tucker cores
  before the last update. Here the vectors are computed from the cores, with the signs of the buffers.
- Where UltraMemV2 has a query per Tucker rank, see `released_queries` of `load_olmo`.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import UserError, choice
from ultramem_jax.interop.entries import check_index, compare_names
from ultramem_jax.interop.olmo_config import (
    CONFIG_FILE,
    Dtype,
    OlmoModel,
    QkNorm,
    olmo_model,
    read_section,
)
from ultramem_jax.interop.olmo_fields import check_section
from ultramem_jax.interop.olmo_files import FLOATS, INTEGERS, OlmoTensors, open_tensors
from ultramem_jax.interop.olmo_names import Stored, query_norm_name, stored_tensors
from ultramem_jax.nested import put
from ultramem_jax.tree_types import Variables

_UNREAD = "transformer.full_memory_layer."
"""Prefix of the table that the authors' Memory+ declares even in a model without memories."""


def is_olmo_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Tells whether a folder has a `config.yaml` with the fields of an OLMo model under `model`."""
    return read_section(pathlib.Path(folder)) is not None


def load_olmo(
    folder: str | os.PathLike[str], dtype: Dtype | None = None, *, released_queries: bool = False
) -> tuple[ModelConfig, Variables]:
    """Loads a model from a folder. Tensors are read one by one, so host memory holds the model once.

    Args:
        folder: folder with `config.yaml` and `model.safetensors`.
        dtype: dtype of the computation and of the parameters outside memories. With None the computation is
            in float32, and the parameters keep the dtype of the file.
        released_queries: matters only for UltraMemV2 with `mem_q_for_each_tucker_rank`. False reads
            `query_proj.weight` as (side, rank, d_k), a query per side and rank, as it is meant. True computes
            what the released code does: its two ranks share queries, which are the first 2·d_k rows, and
            nothing reads the other rows.

    Returns:
        The config, without dropout and with `vocab_size` rows of the padded embedding, and the variables:
        `params`, `memory` (the tables) and `buffers`. All arrays of memories are float32, permutations int32.

    Raises:
        UserError: the folder is no such checkpoint; the config has a field that is unknown, or a value that
            is not computed here; a tensor is missing, extra, misshapen, of another kind of dtype, not finite,
            or no permutation.
    """
    model, tensors = _opened(pathlib.Path(folder), dtype, released_queries)
    expected = stored_tensors(model)
    has_memories = model.reference is not None
    ignored = () if has_memories else tuple(name for name in tensors.names if name.startswith(_UNREAD))
    given = [name for name in tensors.names if name not in ignored]
    names = [name for one in expected for name in one.names]
    compare_names(given, names, tensors.where, "the model does")
    for one in expected:
        for name in one.names:
            tensors.check(name, one.shape, INTEGERS if one.permutation else FLOATS, one.parts)
    of_memories = {site.name for site in model.config.sites}
    variables: dict[str, Any] = {"params": {}, "memory": {}, "buffers": {}}
    for one in expected:
        for path, value in one.pieces([_read(tensors, one, name) for name in one.names]):
            of_memory = path[0] != "params" or path[1] in of_memories
            kind = "int32" if one.permutation else "float32" if of_memory else dtype or value.dtype
            put(variables, path, jnp.asarray(value, kind))
    return model.config, variables


def read_olmo_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Returns the config that `load_olmo` returns, without reading the tensors.

    Raises:
        UserError: the folder is no such checkpoint, or the config is not one that is computed here.
    """
    return _opened(pathlib.Path(folder), None, False)[0].config


def _opened(
    folder: pathlib.Path, dtype: Dtype | None, released_queries: bool
) -> tuple[OlmoModel, OlmoTensors]:
    """Opens a checkpoint whose config is computed here. The arguments are those of `load_olmo`."""
    of_compute: Dtype = dtype or "float32"
    choice("dtype", of_compute, ("float32", "bfloat16"))
    where, section = str(folder / CONFIG_FILE), read_section(folder)
    if section is None:
        raise UserError(f"{where}: must be the config of an OLMo checkpoint, with d_model under model")
    check_section(section, where)
    # The number of files does not depend on the norm of queries and keys, which only the tensors show.
    parts = olmo_model(section, where, "per_head", of_compute, released_queries).table_parts
    tensors = open_tensors(folder, parts)
    return olmo_model(section, where, _qk_norm(section, tensors), of_compute, released_queries), tensors


def _qk_norm(section: Mapping[str, Any], tensors: OlmoTensors) -> QkNorm:
    """Returns what a norm of queries is over: one head in the authors' code, all heads in that of OLMoE."""
    return "all_heads" if tensors.shape(query_norm_name(0)) == (section["d_model"],) else "per_head"


def _read(tensors: OlmoTensors, one: Stored, name: str) -> np.ndarray:
    array = tensors.read(name, one.parts)
    if one.permutation:
        check_index(array, None, f"{tensors.where}: {name}")
    return array
