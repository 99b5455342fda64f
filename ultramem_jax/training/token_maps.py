"""Fits memories that are addressed by tokens to the tokenizer of a run."""

import dataclasses

import jax
import numpy as np

from ultramem_jax.config import ModelConfig, RunConfig
from ultramem_jax.data import Tokenizer
from ultramem_jax.data.canonical_ids import canonical_ids
from ultramem_jax.tree_types import ArrayTree


def for_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> tuple[RunConfig, np.ndarray | None]:
    """Returns the config with what its memories must know of the tokenizer, and the map of its tokens.

    Args:
        config: the run's config.
        tokenizer: the tokenizer of its corpus.

    Returns:
        The config, and the map token -> canonical id, (V,) int32; None where no memory asks for it.
    """
    if not any(memory.address.reads_tokens for memory in config.model.memories.values()):
        return config, None
    canonical = canonical_ids(tokenizer)
    memories = {
        name: dataclasses.replace(memory, address=memory.address.with_token_map(canonical))
        for name, memory in config.model.memories.items()
    }
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memories=memories)), canonical


def with_token_maps(config: ModelConfig, buffers: ArrayTree, canonical: np.ndarray) -> ArrayTree:
    """Returns the buffers of a model with the token maps of its tokenizer, each placed as it is now.

    Args:
        config: the model's config, from `for_tokenizer`.
        buffers: the model's collection `buffers`.
        canonical: canonical ids from `for_tokenizer`.
    """
    buffers = dict(buffers)
    for site in config.sites:
        own = dict(buffers.get(site.name, {}))
        for name, value in site.config.address.token_buffers(site, canonical).items():
            own[name] = jax.make_array_from_callback(value.shape, own[name].sharding, value.__getitem__)
        if own:
            buffers[site.name] = own
    return buffers
