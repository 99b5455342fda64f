"""Runs that were begun when a model had one memory, all of whose fields were in one dict."""

import chex
import pytest

from tests.support.small_run import small_config
from ultramem_jax.config import RunConfig, run_config_from_dict, to_dict
from ultramem_jax.config.old_configs import is_old_tree, upgrade_tree
from ultramem_jax.errors import UserError
from ultramem_jax.training import loop
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.state import model_variables

RENAMED = {"sharing": "table_sharing", "dtype": "table_dtype"}


def as_before(config):
    """The dict of a config as version 0.2 wrote it."""
    tree = to_dict(config)
    if not isinstance(config, RunConfig):
        return tree
    (memory,) = tree["model"].pop("memories").values()
    flat = {name: memory[name] for name in ("placement", "value_lr_multiple")}
    flat |= {name: value for name, value in memory["address"].items() if name != "kind"}
    flat |= {RENAMED.get(name, name): value for name, value in memory["table"].items()}
    flat |= {name: value for name, value in memory["readout"].items() if name != "kind"}
    tree["model"]["memory"] = flat
    return tree


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run whose checkpoints have such a config; its config and folder."""
    config = small_config(tmp_path)
    monkeypatch.setattr(loop, "to_dict", as_before)
    result = loop.train(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    return config, result, tmp_path / "run"


def test_they_are_read_and_not_gone_on_with(run):
    config, result, folder = run
    loaded = load_model(folder)
    assert loaded.config == config
    chex.assert_trees_all_equal(loaded.variables, model_variables(result.state))
    with pytest.raises(UserError, match=r"was begun by an earlier version.*load_model reads it") as error:
        loop.train(config, folder, progress=False)
    assert "\n" not in str(error.value)


def test_a_config_is_the_same_in_current_fields(tmp_path):
    config = small_config(tmp_path)
    before = as_before(config)
    assert is_old_tree(before) and not is_old_tree(to_dict(config))
    assert run_config_from_dict(before) == config
    without = before | {"model": before["model"] | {"memory": None}}
    assert run_config_from_dict(without).model.memories == {}
    assert upgrade_tree(to_dict(config)) == to_dict(config)
    for flag, words in ((True, "all_heads"), (False, "none")):
        normed = before | {"model": before["model"] | {"attention_qk_norm": flag}}
        assert run_config_from_dict(normed).model.attention_qk_norm == words
    odd = before | {"model": before["model"] | {"memory": "x"}}
    with pytest.raises(UserError, match=r"unknown config key 'model\.memory'"):
        run_config_from_dict(odd)
    wrong = before | {"model": before["model"] | {"memory": before["model"]["memory"] | {"topm": 3}}}
    with pytest.raises(UserError, match=r"model\.memories\.memory\.address\.topm.*did you mean 'top_m'"):
        run_config_from_dict(wrong)
