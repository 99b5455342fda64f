import json
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.support import synthetic
from tests.support.documents import local_links, python_blocks
from tests.support.paths import ROOT
from ultramem_jax.interop.reference_torch import read_safetensors, write_safetensors

README = ROOT / "README.md"
BLOCKS = python_blocks(README)


def test_the_library_example_runs():
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(BLOCKS[0], names)
    assert names["logits"].shape == (2, 64, 257)
    assert set(names["variables"]) == {"params", "memory", "buffers"}


def test_the_example_of_the_authors_weights_runs(tmp_path, monkeypatch):
    hyper, state, x, result = synthetic.case("v2_summed_gelu")
    monkeypatch.chdir(tmp_path)
    pathlib.Path("memory.json").write_text(json.dumps(hyper))
    write_safetensors("memory.safetensors", state)
    (example,) = (block for block in BLOCKS if "interop" in block)
    names = {"x": x}
    exec(example, names)
    np.testing.assert_allclose(names["y"], result.output, rtol=1e-4, atol=1e-5)
    synthetic.equal_states(read_safetensors("again.safetensors"), state)


@pytest.mark.parametrize("link", local_links(README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_every_config_field_that_it_names_exists():
    from ultramem_jax.presets import families

    text = README.read_text()
    table = text[text.index("| change | field") :].split("\n\n")[0]
    named = re.findall(r"`([a-z_]+)`", "".join(row.split("|")[2] for row in table.splitlines()[2:]))
    assert len(named) >= 11 and all(families.ultramem().find(name) for name in named)
