"""Saving and restoring: bits, which checkpoints stay, and what is refused."""

from functools import partial

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.assertions import assert_same_bits
from tests.support.checkpoint_states import CONFIG, CORPUS, abstract, make_state, save_all
from ultramem_jax.config import ModelConfig, RunConfig, to_dict
from ultramem_jax.errors import UserError
from ultramem_jax.presets import families
from ultramem_jax.training import checkpoints as module
from ultramem_jax.training.checkpoints import Checkpoints

# ---- round trips


def test_round_trip_is_bit_for_bit(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()), expect_config=CONFIG)
    assert_same_bits(restored.state, make_state(20))
    assert (restored.step, restored.skipped) == (20, ())
    assert (restored.meta.step, restored.meta.config, restored.meta.corpus) == (20, CONFIG, CORPUS)
    assert restored.meta.validation_loss == 1.0
    assert restored.meta.versions["jax"] == jax.__version__


def test_a_given_step_is_restored(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(make_state()), step=10).state, make_state(10))
        assert checkpoints.read_meta(10).validation_loss == 2.0
        with pytest.raises(
            UserError, match=r"no checkpoint of step 15 in .*: it holds checkpoints of step 10, 20"
        ):
            checkpoints.restore(abstract(make_state()), step=15)


def test_donation_right_after_save_does_not_touch_the_checkpoint(tmp_path):
    state = {"table": jnp.arange(2**21, dtype=jnp.float32).reshape(-1, 64), "flat": jnp.ones(7)}
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(partial(jax.tree.map, lambda x: x * 0.0 - 1.0), donate_argnums=0)
    spare = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(overwrite(spare))  # compiled, so that it comes at once
    assert spare["table"].is_deleted()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None, CONFIG, CORPUS)
        state = jax.block_until_ready(overwrite(state))
        assert float(state["table"].max()) == -1.0
        restored = checkpoints.restore(abstract(state)).state
    assert_same_bits(restored, jax.tree.map(jnp.asarray, expected))


def test_position_of_the_data_iterator(tmp_path):
    def iterator():
        return iter(grain.MapDataset.range(1000).shuffle(seed=3).repeat().batch(4).to_iter_dataset())

    data = iterator()
    for _ in range(5):
        next(data)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(), data, CONFIG, CORPUS)
        following = [next(data) for _ in range(3)]  # the save is in flight
        fresh = iterator()
        checkpoints.restore(abstract(make_state()), fresh)
    chex.assert_trees_all_equal([next(fresh) for _ in range(3)], following)


# ---- what is kept


def test_keeps_the_newest_and_the_best(tmp_path):
    save_all(tmp_path, [3.0, 1.0, None, 2.0, 5.0, float("nan"), 4.0], keep_last=2, keep_best=2)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [20, 40, 60, 70]
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (70, 20)


def test_checkpoints_without_a_loss_are_kept_only_by_recency(tmp_path):
    save_all(tmp_path, [None, None, None], keep_last=1, keep_best=3)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.best_step()) == ([30], None)


def test_the_best_is_remembered_by_the_next_process(tmp_path):
    save_all(tmp_path, [1.0, 2.0], keep_last=1, keep_best=1)
    with Checkpoints(tmp_path, keep_last=1, keep_best=1) as checkpoints:
        checkpoints.restore(abstract(make_state()))
        checkpoints.save(30, make_state(), None, CONFIG, CORPUS)
        checkpoints.mark(30, 3.0)
        checkpoints.wait()
        assert checkpoints.all_steps() == [10, 30]


# ---- what does not fit


def test_another_model_is_refused_before_arrays_are_read(saved, monkeypatch):
    monkeypatch.setattr(module, "read_state", lambda *_, **__: pytest.fail("read"))
    here = to_dict(
        RunConfig(model=ModelConfig(embed_dim=256, memories={"memory": families.ultramem(placement="1:2")}))
    )
    here["data"]["tokenizer"] = "bpe"
    expected = (
        f"checkpoint at {saved / '20'} is of another model: model.embed_dim is 128 there and 256 here; "
        "model.memories.memory is None there and given here; data.tokenizer is 'bytes' there and 'bpe' here"
    )
    with Checkpoints(saved, read_only=True) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(abstract(make_state()), expect_config=here)
    assert str(error.value) == expected


def test_settings_of_training_may_differ(saved):
    here = to_dict(RunConfig())
    here["train"]["steps"] = 7
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), expect_config=here).step == 20


def test_another_state_is_refused_by_entry(saved):
    state = abstract(make_state(width=16))
    state = state.replace(
        tables={"memory_1": state.tables["memory_0"]}, rng=jax.ShapeDtypeStruct((2,), jnp.int32)
    )
    with Checkpoints(saved, read_only=True) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(state)
        with pytest.raises(UserError, match=r"params.bias is float32.8. there and float32.16. here$"):
            checkpoints.restore_subtree(
                {"params": {**abstract(make_state()).params, "bias": state.params["bias"]}}
            )
    message = str(error.value)
    assert message.startswith(f"checkpoint at {saved / '20'} holds another state: ")
    assert "params.bias is float32[8] there and float32[16] here" in message
    assert message.endswith(
        "; tables.memory_1 is absent there and float32[64,16] here; rng is uint32[2] there "
        "and int32[2] here; and 1 more"
    )
    assert "\n" not in message


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match=f"no checkpoints: there is no directory {tmp_path / 'none'}"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.latest_step(), checkpoints.best_step()) == (
            [],
            None,
            None,
        )
        with pytest.raises(UserError, match=f"no checkpoints in {tmp_path / 'new'}"):
            checkpoints.read_meta()
