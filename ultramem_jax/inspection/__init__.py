"""Looks inside memories: what text reads, what slots stand for, and what the model is without them.

    found = trace(config, variables, tokenizer, "The capital of France is Paris")
    found.memories["ultramem_0"].slots        # (S, R), the rows that each token reads
    html = page(config, variables, tokenizer, "The capital of France is Paris")

All functions take a model's config, its variables (`training.restore.load_model`, `interop.open_models.load`)
and, where text comes in, its tokenizer. `pages` writes their results as one HTML file.
"""

from ultramem_jax.inspection.corpus import CorpusReads, TableReads, corpus_pass
from ultramem_jax.inspection.edits import Edit, edit, parse_edit, row_changes, save_edited_run
from ultramem_jax.inspection.knock_outs import KnockOut, knock_out, knock_out_each
from ultramem_jax.inspection.neighbours import nearest_slots
from ultramem_jax.inspection.pages import page
from ultramem_jax.inspection.promotion import Promoted, promoted_tokens
from ultramem_jax.inspection.tracing import MemoryReads, Trace, trace
from ultramem_jax.inspection.usage import Usage, training_curves, usage

__all__ = [
    "CorpusReads",
    "Edit",
    "KnockOut",
    "MemoryReads",
    "Promoted",
    "TableReads",
    "Trace",
    "Usage",
    "corpus_pass",
    "edit",
    "knock_out",
    "knock_out_each",
    "nearest_slots",
    "page",
    "parse_edit",
    "promoted_tokens",
    "row_changes",
    "save_edited_run",
    "trace",
    "training_curves",
    "usage",
]
