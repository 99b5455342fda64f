"""One named `ModelConfig` per published model, and tiny families to try things with.

`NOTES` says of every preset what is published and what was inferred, `INFERRED` names those whose shape was,
at least in part; `presets.published` holds the published numbers, and `tests/test_presets.py` the exact
counts. The UltraMem paper's counts leave out embeddings and gains (`Parameters.paper_dense`,
`Parameters.paper_total`), the UltraMemV2 paper's have them (`active_total`, `total`).
"""

from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import unknown
from ultramem_jax.presets import engram_paper, ladder, tiny, ultramem_paper, v2_paper
from ultramem_jax.presets.published import PUBLISHED

_PAPERS = (ultramem_paper, ladder, v2_paper, engram_paper)
_FAMILIES = (tiny, *_PAPERS)

PRESETS: dict[str, ModelConfig] = {name: model for part in _FAMILIES for name, model in part.PRESETS.items()}
"""Every named model."""

INFERRED: frozenset[str] = frozenset(name for part in _PAPERS for name in part.PRESETS) - v2_paper.WHOLE
"""Published models of whose shape something is not published."""


def _results(name: str) -> str:
    return PUBLISHED[name].results() if name in PUBLISHED else ""


NOTES: dict[str, str] = {
    name: f"{note} {_results(name)}".strip() for part in _FAMILIES for name, note in part.NOTES.items()
}
"""Where each preset comes from: what is published, what was inferred, and the published losses."""


def preset(name: str) -> ModelConfig:
    """The preset of that name.

    Raises:
        UserError: unknown; it names the nearest one and lists all.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
