"""Weights from and for other implementations of the layers."""
