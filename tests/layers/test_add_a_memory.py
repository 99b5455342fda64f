"""The guide docs/guides/add_a_memory.md: its code runs and keeps the contract.

Its commands run in tests/docs/test_guide_commands.py.
"""

import runpy
import sys
from dataclasses import replace

import pytest

from tests.support.documents import GUIDES, write_files
from tests.support.memory_contract import BASE, check_contract
from ultramem_jax.config.memory_kinds import ADDRESSERS

GUIDE = GUIDES / "add_a_memory.md"


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """Returns the names that the guide's files define; its kind is taken out of the registry afterwards."""
    write_files(GUIDE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = runpy.run_path("my_run.py")
    yield names | vars(names["my_memory"])
    ADDRESSERS.remove("sign_bits")
    del sys.modules["my_memory"]


def test_the_toy_keeps_the_contract(guide, tmp_path):
    signs = guide["model"].memories["signs"]
    check_contract(replace(BASE, memories={"signs": signs.changed(value_dim=8)}), tmp_path)


def test_a_name_is_taken_once(guide):
    with pytest.raises(ValueError, match="address kind 'sign_bits' is taken by SignBits"):
        ADDRESSERS.add("sign_bits")(guide["SignBits"])
    with pytest.raises(ValueError, match="'product_keys' is taken by ProductKeys"):
        ADDRESSERS.add("product_keys")(guide["SignBits"])
