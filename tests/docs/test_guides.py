"""The code of docs/guides runs; that of add_a_memory.md in tests/layers/test_add_a_memory.py."""

import numpy as np

from tests.support import engram_states as engram
from tests.support.documents import GUIDES, local_links, python_blocks
from ultramem_jax.accounting import count_parameters
from ultramem_jax.interop.reference_torch import write_safetensors


def test_the_models_of_the_guide_to_engram():
    names: dict = {}
    exec(python_blocks(GUIDES / "engram.md")[0], names)
    model = names["model"]
    assert [site.name for site in model.sites] == ["engram_0", "engram_1", "ultramem_0"]
    assert all(site.num_slots % 64 == 0 for site in model.sites if site.group == "engram")
    assert count_parameters(model).memory_tables > 2 * 16 * 65_536 * 8


def test_the_weights_of_the_guide_to_engram(tmp_path, monkeypatch):
    hyper, state, x, token_ids = engram.case("two layers")
    monkeypatch.chdir(tmp_path)
    write_safetensors("engram.safetensors", state)
    names = {"hyper": hyper, "x": x, "token_ids": token_ids}
    exec(python_blocks(GUIDES / "engram.md")[1], names)
    expected = engram.expected_output(hyper, state, x, engram.expected_slots(hyper, state, token_ids))
    np.testing.assert_allclose(names["y"], expected, rtol=1e-3, atol=1e-4)


def test_links_lead_somewhere():
    for guide in GUIDES.glob("*.md"):
        for link in local_links(guide):
            assert (guide.parent / link).exists(), (guide.name, link)
