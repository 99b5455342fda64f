"""Training: dense parameters by optax, value tables by rows, checkpoints, metrics and the loop."""
