"""The code of docs/guides runs; that of add_a_memory.md in tests/layers/test_add_a_memory.py.

What needs a trained run is in test_guide_commands.py.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import engram_states as engram
from tests.support import synthetic
from tests.support.documents import GUIDES, local_links, python_blocks
from tests.support.fixtures import standard_promotion  # noqa: F401
from ultramem_jax.accounting import count_parameters
from ultramem_jax.interop.reference_torch import read_safetensors, write_safetensors
from ultramem_jax.models import Transformer
from ultramem_jax.ops.lookup import RowGradients


def _run(guide, **names):
    """The names that the code of a guide leaves."""
    names["__name__"] = guide
    for block in python_blocks(GUIDES / f"{guide}.md"):
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def lion():
    return _run("add_a_row_optimizer")


def test_the_optimizer_of_the_guide_trains(lion):
    moved = np.ones((6, 2), np.float32)
    moved[1], moved[4] = (0.9, 1.1), (0.9, 1.0)
    chex.assert_trees_all_close(lion["after"].table, moved, rtol=1e-6)
    losses, state = lion["losses"], lion["state"]
    chex.assert_tree_all_finite(losses)
    assert losses[-1] < losses[0] - 1
    # By rows: those that were read have a moment, and some were not.
    read = np.asarray(state.table_state["memory_0"]["values"].first).any(1)
    assert 0 < read.sum() < len(read)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_optimizer_of_the_guide_is_that_of_optax_where_every_row_is_read(lion, decay):
    optimizer = lion["row_sparse"](lion["lion"](0.9, 0.99, decay), lambda step: 0.1)
    dense = optax.lion(0.1, 0.9, 0.99, weight_decay=decay)
    rng = np.random.default_rng(0)
    table = expected = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    state, dense_state = optimizer.init(table), dense.init(table)
    for step in range(4):
        gradient = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
        rows = RowGradients(jnp.arange(5, dtype=jnp.int32), gradient)
        table, state, *_ = optimizer.update(rows, state, table, jnp.int32(step), jnp.uint32(0))
        change, dense_state = dense.update(gradient, dense_state, expected)
        expected = optax.apply_updates(expected, change)
        chex.assert_trees_all_close(table, expected, rtol=1e-5, atol=1e-6)


def test_the_places_exist_that_the_guide_names_an_optimizer_in():
    rows = (GUIDES / "add_a_row_optimizer.md").read_text().partition("| file |")[2].splitlines()[2:5]
    places = {
        "row_states.py": ("RowOptimizer = Literal[", "def row_arrays("),
        "row_rules.py": ("def row_rule(", 'case "adamw"'),
        "dense_optimizer.py": ("def _of_tables(",),
    }
    for row, (file, texts) in zip(rows, places.items(), strict=True):
        path = GUIDES.parents[1] / re.search(r"`(ultramem_jax/\S+)`", row)[1]
        assert path.name == file
        assert all(text in path.read_text() for text in texts)


def test_the_weights_of_the_authors_go_in_and_out(tmp_path, monkeypatch):
    hyper, state, x, result = synthetic.case("v1_three_heads")
    monkeypatch.chdir(tmp_path)
    write_safetensors("memory.safetensors", state)
    names = _run("read_the_authors_weights", x=x)
    assert names["hyper"].items() <= hyper.items()
    chex.assert_trees_all_close(names["y"], result.output, rtol=1e-4, atol=1e-5)
    synthetic.equal_states(read_safetensors("again.safetensors"), state)
    # The layer's variables are those of the memory of the model.
    own = jax.eval_shape(Transformer(names["model"]).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    shapes = jax.tree.map(jnp.shape, names["variables"]["params"]["memory_0"])
    assert shapes == jax.tree.map(jnp.shape, dict(own["params"]["authors_0"]))


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
    chex.assert_trees_all_close(names["y"], expected, rtol=1e-3, atol=1e-4)


def test_links_lead_somewhere():
    for guide in GUIDES.glob("*.md"):
        for link in local_links(guide):
            assert (guide.parent / link).exists(), (guide.name, link)
