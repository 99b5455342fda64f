"""Bounds the sizes of a model, at values far above any published ones.

Without bounds, a typing error of a few zeros would look like a machine that hangs: the program unrolls the
layers, and tracing computes some quantities that depend on D. The deepest published Transformer has 1,000
layers (DeepNet, arXiv 2203.00555). Tracing it takes half a minute.
"""

LARGEST = {"vocab_size": 2**24, "num_layers": 1000, "embed_dim": 2**20}
"""Largest value of some fields of `ModelConfig`, by the name of the field."""
