"""Names one `ModelConfig` for each published model, and families of tiny models for experiments.

`NOTES` says for every preset what is published and what is inferred. `INFERRED` names the presets whose shape
is inferred, at least in part. `presets.published` holds the published numbers, and
`tests/presets/test_presets.py` the exact counts. The counts of the UltraMem paper leave out embeddings and
gains (`Parameters.paper_dense`, `Parameters.paper_total`). Those of the UltraMemV2 paper include them
(`active_total`, `total`).
"""

from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import unknown
from ultramem_jax.presets import engram_paper, ladder, tiny, ultramem_paper, v2_paper
from ultramem_jax.presets.published import PUBLISHED

_PAPERS = (ultramem_paper, ladder, v2_paper, engram_paper)
_FAMILIES = (tiny, *_PAPERS)

PRESETS: dict[str, ModelConfig] = {name: model for part in _FAMILIES for name, model in part.PRESETS.items()}
"""All presets by name."""

INFERRED: frozenset[str] = frozenset(name for part in _PAPERS for name in part.PRESETS) - v2_paper.WHOLE
"""Names of the presets of published models whose shape is not fully published."""


def _results(name: str) -> str:
    """Returns the published results of a preset in a sentence; empty if there are none."""
    return PUBLISHED[name].results() if name in PUBLISHED else ""


NOTES: dict[str, str] = {
    name: f"{note} {_results(name)}".strip() for part in _FAMILIES for name, note in part.NOTES.items()
}
"""Source of each preset: what is published, what is inferred, and the published losses."""


def preset(name: str) -> ModelConfig:
    """Returns the preset of a name.

    Raises:
        UserError: unknown name; the message names the nearest one and lists all.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
