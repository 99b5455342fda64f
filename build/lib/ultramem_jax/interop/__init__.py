"""Converts weights from and to other implementations of the layers."""
