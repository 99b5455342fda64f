"""Provides the models: the decoder around the layers, and sampling from it."""

from ultramem_jax.models.transformer import Transformer

__all__ = ["Transformer"]
