"""Bounds the sizes of a model, far above any that was published.

Beyond them a typing error of a few zeros looks like a machine that hangs: layers are unrolled in the program,
and some of what depends on D is computed while it is traced. The deepest published Transformer has 1,000
layers (DeepNet, arXiv 2203.00555), which take half a minute to trace.
"""

LARGEST = {"vocab_size": 2**24, "num_layers": 1000, "embed_dim": 2**20}
"""Field of `ModelConfig` -> its largest value."""
