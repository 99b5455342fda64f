"""The guide docs/guides/add_a_memory.md: its code runs, keeps the contract, and trains."""

import pathlib
import re

import pytest

from tests.memory_contract import BASE, check_contract
from ultramem_jax.memory_kinds import ADDRESSERS

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guides" / "add_a_memory.md"


@pytest.fixture
def guide():
    """The names that the guide's code defines; its kind is taken out of the registry afterwards."""
    found = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S):
        exec(compile(block, str(GUIDE), "exec"), found)
    yield found
    ADDRESSERS.remove("sign_bits")


def test_the_toy_keeps_the_contract(guide, tmp_path):
    from dataclasses import replace

    signs = guide["model"].memories["signs"]
    check_contract(replace(BASE, memories={"signs": signs.changed(value_dim=8)}), tmp_path)


def test_a_name_is_taken_once(guide):
    with pytest.raises(ValueError, match="address kind 'sign_bits' is taken by SignBits"):
        ADDRESSERS.add("sign_bits")(guide["SignBits"])
    with pytest.raises(ValueError, match="'product_keys' is taken by ProductKeys"):
        ADDRESSERS.add("product_keys")(guide["SignBits"])
