"""Configures the readout of Engram: concatenated rows, gated by the hidden state, and a dilated convolution.

Let e be the R rows of a token, concatenated, and h its hidden state. Then:

    v = W_v·e + b_v
    k = W_k·e + b_k
    g = ⟨RMSNorm(k), RMSNorm(h)⟩/√D
    α = σ(sign(g)·√max(|g|, 1e-6))
    u = α·v
    output = u + SiLU(causal depthwise convolution of RMSNorm(u))

This is section 2.3 of arXiv 2601.07372, with one residual stream. The Flax module is in `gate_readout`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.config.memory_kinds import READOUTS
from ultramem_jax.config.memory_parts import Parameter, ReadoutConfig
from ultramem_jax.tree_types import ArrayTree

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

_MOST_WIDTH = 256
"""Largest width of the convolution: each tap is a step of the compiled program."""


@READOUTS.add("context_gate")
@dataclass(frozen=True)
class ContextGate(ReadoutConfig):
    """Gates the values of a token's rows by how well their keys fit its hidden state, as Engram does."""

    kind: Literal["context_gate"] = "context_gate"
    conv_width: int = 4
    """Number of taps of the convolution over the sequence, whose weights start at zero. 0 is off."""
    conv_dilation: int = 3
    """Distance of two taps, in positions; n_max in the paper."""
    gate_norm_eps: float = 0.0
    """Epsilon of the gate's two norms. 0 is the machine epsilon of float32, 1.2e-7, as in the released demo.
    The norm before the convolution uses the model's `norm_eps`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "conv_width", "gate_norm_eps")
        self.at_least(1, "conv_dilation")
        self.require(self.conv_width <= _MOST_WIDTH, "conv_width", f"must be at most {_MOST_WIDTH}")

    def parameters(self, site: MemorySite) -> dict[str, Parameter]:
        """Returns two projections (R·d_v, D), their biases, three gains, and the taps of the convolution."""
        d = site.context.embed_dim
        width = site.config.num_blocks * site.config.table.value_dim
        found = {
            name: Parameter((width, d), (None, "embed"), "projection")
            for name in ("value_projection", "key_projection")
        }
        for name in ("value_bias", "key_bias"):
            found[name] = Parameter((d,), (None,), "biases", "gain")
        gains = ("gate_key_scale", "gate_hidden_scale", *(("conv_scale",) if self.conv_width else ()))
        for name in gains:
            found[name] = Parameter((d,), (None,), "norms", "gain")
        if self.conv_width:
            found["conv"] = Parameter((self.conv_width, d), (None, "embed"), "conv", "weights")
        return found

    @property
    def last_factors(self) -> tuple[str, ...]:
        """Returns W_v and b_v: without them v is zero, and so are u and its convolution."""
        return ("value_projection", "value_bias")

    def extra_flops(self, site: MemorySite) -> int:
        """Returns 2·D, the FLOPs of the product of key and hidden state."""
        return 2 * site.context.embed_dim

    def cache(self, site: MemorySite) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns what decoding keeps: the last inputs of the convolution, if there is one."""
        back = self.look_back
        return {"conv_inputs": ((back, site.context.embed_dim), site.context.dtype)} if back else {}

    @property
    def look_back(self) -> int:
        """Returns the number of positions that the convolution looks back."""
        return max(self.conv_width - 1, 0) * self.conv_dilation

    def value_matrix(self, site: MemorySite, params: ArrayTree, block: int) -> "jax.Array | None":
        """Returns the rows of W_v that a read's row meets; α, b_v and the convolution are left out."""
        width = site.config.table.value_dim
        matrix: jax.Array = params["value_projection"][block * width : (block + 1) * width]
        return matrix

    def readout(self, site: MemorySite, name: str | None = None) -> "nn.Module":
        """Returns the Flax module of this readout, `ContextGateReadout`."""
        from ultramem_jax.layers.memory.gate_readout import ContextGateReadout

        return ContextGateReadout(site, self, name=name)
