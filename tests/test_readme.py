import pathlib
import re

import jax
import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_example_runs():
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(BLOCKS[0], names)
    assert names["logits"].shape == (2, 64, 257)
    assert set(names["variables"]) == {"params", "memory", "buffers"}


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (pathlib.Path(__file__).parents[1] / link).exists()


def test_every_config_field_that_it_names_exists():
    from ultramem_jax.config import MemoryConfig

    fields = set(MemoryConfig.__dataclass_fields__)
    table = README[README.index("| change | field") :].split("\n\n")[0]
    named = re.findall(r"`([a-z_]+)`", "".join(row.split("|")[2] for row in table.splitlines()[2:]))
    assert len(named) >= 11 and set(named) <= fields
