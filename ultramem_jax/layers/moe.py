"""Implements Mixture of Experts (MoE) with dropless top-k routing, the baseline of memory layers.

This module routes tokens and computes the losses and metrics of routing, over all tokens of all devices.
`experts` computes the experts on one device, `expert_parallel` on a mesh, `served_experts` in decoding on
CPU.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ultramem_jax.config import ModelConfig
from ultramem_jax.layers.expert_parallel import experts_on_mesh
from ultramem_jax.layers.experts import (
    ExpertWeights,
    PaddedExperts,
    block_experts,
    block_shape,
    compute_experts,
    dispatch_plan,
    ragged_experts,
)
from ultramem_jax.layers.mlp import MLP, fan_in_normal, output_normal
from ultramem_jax.layers.parameters import matrix
from ultramem_jax.layers.served_experts import served_experts
from ultramem_jax.layers.sowing import sow
from ultramem_jax.ops import topk
from ultramem_jax.ops.on_mesh import constrain_tokens, current_axes, per_token

__all__ = [
    "ExpertWeights",
    "MoE",
    "Router",
    "block_experts",
    "block_shape",
    "dispatch_plan",
    "ragged_experts",
    "route",
]


class Router(NamedTuple):
    """Holds the router's choices for T tokens; all but `experts` and `load` are float32."""

    gates: jax.Array
    """(T, k), weight of each chosen expert."""
    experts: jax.Array
    """(T, k) int32, k different experts per token, best first."""
    load: jax.Array
    """(X,) int32, number of assignments of each expert."""
    load_balance: jax.Array
    """(), load-balance loss X·Σ f_i·p_i: f the shares of the T·k assignments, p the mean probabilities. 1 if
    uniform."""
    router_z: jax.Array
    """(), z-loss, the mean of logsumexp(logits)²."""
    entropy: jax.Array
    """(), mean entropy of a token's distribution over the experts, in nats."""


def route(logits: jax.Array, top_k: int, normalize_gates: bool) -> Router:
    """Routes each token to its k most probable experts, by logits (T, X) float32.

    The gates are the softmax probabilities over all X experts, divided by their sum if `normalize_gates`.
    The load-balance loss is that of Switch Transformer (arXiv 2101.03961, equation 4) with f over all k
    choices. The z-loss is that of ST-MoE (arXiv 2202.08906, equation 5). The caller weighs both losses.
    """
    num_tokens, num_experts = logits.shape
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[:, None]
    p = jnp.exp(log_p)
    # On a mesh, the compiler would give all tokens to every device to compute this top-k. It splits the
    # losses by itself.
    experts = per_token(lambda p: topk.top_k(p, top_k)[1].astype(jnp.int32), (lax.stop_gradient(p),))
    gates = topk.take_along_last(p, experts)
    if normalize_gates:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    load = jnp.sum(experts.reshape(-1, 1) == ids[None, :], axis=0, dtype=jnp.int32)
    share = load.astype(jnp.float32) / (num_tokens * top_k)
    return Router(
        gates,
        experts,
        load,
        load_balance=num_experts * jnp.sum(share * jnp.mean(p, axis=0)),
        router_z=jnp.mean(jnp.square(log_z)),
        entropy=-jnp.mean(jnp.sum(p * log_p, axis=-1)),
    )


class MoE(nn.Module):
    """Sums gate·expert(x) over the k experts that the router chose for a token, in place of an MLP.

    It sows float32 scalars. `losses` gets `load_balance` and `router_z`, already weighted. `metrics` gets
    `load_max_over_mean` (assignments of the busiest expert over the mean), `experts_chosen` (number of
    experts with an assignment) and `router_entropy` (nats).

    Parameters, float32: `router` (D, X), `w_in` (X, D, F), `w_out` (X, F, D), for SwiGLU `w_gate` (X, D, F).
    In a model served on CPU each but the router is a tuple of X `OutputMajor`, on TPU a `PaddedExperts`.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps x (B, S, D) -> (B, S, D) in `config.dtype`; `train` has no effect.

        Raises:
            ValueError: the config has no `moe`.
        """
        del train
        moe, dtype = self.config.moe, jnp.dtype(self.config.dtype)
        if moe is None:
            raise ValueError("MoE needs config.moe")
        batch, length, width = x.shape
        tokens = constrain_tokens(x.reshape(-1, width))
        into = (moe.num_experts, width, moe.expert_dim)
        out_of = (moe.num_experts, moe.expert_dim, width)
        weights = ExpertWeights(
            w_in=self._matrices("w_in", fan_in_normal(batch_axis=(0,)), into),
            w_out=self._matrices("w_out", output_normal(self.config.num_layers, (0,)), out_of),
            w_gate=self._matrices("w_gate", fan_in_normal(batch_axis=(0,)), into)
            if moe.activation == "swiglu"
            else None,
        )
        w_router = self.param("router", fan_in_normal(), (width, moe.num_experts), jnp.float32)

        # bfloat16 would round close probabilities to ties (Switch Transformer, section 2.4).
        logits = tokens.astype(jnp.float32) @ w_router.astype(jnp.float32)
        router = route(logits, moe.top_k, moe.normalize_gates)
        share = 1 / len(self.config.feed_forward_layers) if moe.auxiliary_over_layers == "mean" else 1.0
        sow(self, "losses", "load_balance", share * moe.load_balance_weight * router.load_balance)
        sow(self, "losses", "router_z", share * moe.router_z_weight * router.router_z)
        mean_load = router.experts.size / moe.num_experts
        sow(self, "metrics", "load_max_over_mean", jnp.max(router.load).astype(jnp.float32) / mean_load)
        sow(self, "metrics", "experts_chosen", jnp.sum(router.load > 0).astype(jnp.float32))
        sow(self, "metrics", "router_entropy", router.entropy)

        tokens = tokens.astype(dtype)
        axes = current_axes()
        if isinstance(weights.w_in, tuple):
            y = served_experts(tokens, router.gates, router.experts, weights)
        elif axes is None:
            plan = dispatch_plan(router.experts, moe.num_experts)
            y = compute_experts(moe.implementation, tokens, router.gates, weights, plan)
        else:
            y = experts_on_mesh(axes, moe.implementation, tokens, router.gates, weights, router.experts)
        return y.astype(dtype).reshape(batch, length, width)

    def _matrices(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
        held = matrix(self, name, init, shape)
        return held.weights if isinstance(held, PaddedExperts) else held


def feed_forward(config: ModelConfig, name: str | None = None) -> nn.Module:
    """Returns the feed-forward of a layer: a Mixture of Experts if the config has one, else the MLP."""
    return MLP(config, name=name) if config.moe is None else MoE(config, name=name)
