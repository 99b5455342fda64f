"""Lists the cases of all native kernels."""

from tests.support.retrieval_cases import (
    best_cells,
    best_cells_gradient,
    best_keys,
    key_gradient,
    key_scores,
    ngram_slots,
    query_gradient,
    rms_norm,
    rms_norm_gradient,
    top_k,
)
from tests.support.row_cases import pool, products, record_reads, row_mean_squares, rows_read, update_rows

CASES = {
    case.__name__: case
    for case in (
        top_k,
        best_keys,
        key_scores,
        query_gradient,
        key_gradient,
        rms_norm,
        rms_norm_gradient,
        best_cells,
        best_cells_gradient,
        pool,
        products,
        rows_read,
        record_reads,
        update_rows,
        row_mean_squares,
        ngram_slots,
    )
}
"""Functions that draw a case, by the name of the kernel."""
