"""The guide docs/guides/add_a_memory.md: its code runs, keeps the contract, and trains."""

from dataclasses import replace

import pytest

from tests.support.documents import GUIDES, python_blocks
from tests.support.memory_contract import BASE, check_contract
from ultramem_jax.config.memory_kinds import ADDRESSERS

GUIDE = GUIDES / "add_a_memory.md"


@pytest.fixture
def guide():
    """The names that the guide's code defines; its kind is taken out of the registry afterwards."""
    found = {"__name__": "guide"}
    for block in python_blocks(GUIDE):
        exec(compile(block, str(GUIDE), "exec"), found)
    yield found
    ADDRESSERS.remove("sign_bits")


def test_the_toy_keeps_the_contract(guide, tmp_path):
    signs = guide["model"].memories["signs"]
    check_contract(replace(BASE, memories={"signs": signs.changed(value_dim=8)}), tmp_path)


def test_a_name_is_taken_once(guide):
    with pytest.raises(ValueError, match="address kind 'sign_bits' is taken by SignBits"):
        ADDRESSERS.add("sign_bits")(guide["SignBits"])
    with pytest.raises(ValueError, match="'product_keys' is taken by ProductKeys"):
        ADDRESSERS.add("product_keys")(guide["SignBits"])
