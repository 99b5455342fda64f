"""Trains models: dense parameters by optax, value tables by rows, with checkpoints, metrics and the loop."""
