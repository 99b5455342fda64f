"""Names the kernels of the library."""

NAMES = (
    "best_keys",
    "key_scores",
    "query_gradient",
    "key_gradient",
    "rms_norm",
    "rms_norm_gradient",
    "best_cells",
    "best_cells_gradient",
    "top_k",
    "pool",
    "products",
    "rows_read",
    "record_reads",
    "update_rows",
    "row_mean_squares",
    "ngram_slots",
)
"""Kernels of the library."""


def target(name: str) -> str:
    """Returns the name under which XLA calls a kernel, which is also that of its function in the library."""
    return f"ultramem_{name}"
