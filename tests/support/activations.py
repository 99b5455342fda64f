"""Computes the activations of MLP and experts in float64, from their definitions."""

import math

import numpy as np


def gelu64(x: np.ndarray) -> np.ndarray:
    """Returns x·Φ(x), with Φ approximated by tanh as in the MLP."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu64(x: np.ndarray) -> np.ndarray:
    """Returns x·σ(x)."""
    return x / (1 + np.exp(-x))
