"""Every rule of rows against its definition in float64, and against optax where it has an equal there."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import row_updates
from tests.support.chunk_values import set_chunk_values
from ultramem_jax import ModelConfig, RunConfig, TrainConfig, UserError
from ultramem_jax.config.row_states import ROW_OPTIMIZERS
from ultramem_jax.kernels.rules import RowKernel
from ultramem_jax.ops.lookup import RowGradients
from ultramem_jax.ops.rows import from_stored, stored_dtype, to_stored
from ultramem_jax.presets import families
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.row_rules import RowMoments, row_rule
from ultramem_jax.training.row_sparse import TablePart, row_sparse

ROWS, WIDTH, STEPS = 12, 4, 8
B1, B2, EPS, MOMENTUM = 0.9, 0.95, 1e-8, 0.9
# Every rule, and those that have one with the second moment per row.
CASES = [(name, "element") for name in ROW_OPTIMIZERS] + [("adamw", "row"), ("adamw_catch_up", "row")]


def _rate(step):
    return 0.1 / (1 + step)


def _train(name, second="element", **options):
    return TrainConfig(row_optimizer=name, row_second_moment=second, **options)


def _optimizer(name, second="element", rate=_rate, **options):
    return row_sparse(row_rule(_train(name, second, **options)), rate)


def _rule(name, second, decay):
    """The rule as `row_updates` knows it, with the numbers that a run has."""
    one_per_row = name == "adagrad_row" or second == "row"
    return RowKernel(name, decay, B1, B2, EPS, MOMENTUM, one_per_row)


def _batches(steps=STEPS, rows=ROWS, read=5, seed=0):
    """Per step the rows that it reads, of `rows`, and their gradients; one row has a gradient of zero."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        slots = np.sort(rng.choice(rows, read, replace=False)).astype(np.int32)
        values = rng.standard_normal((read, WIDTH)) * 10.0 ** rng.integers(-3, 1, (read, 1))
        values[rng.integers(read)] = 0
        yield slots, values.astype(np.float32)


def _table(rows=ROWS, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, WIDTH)), jnp.float32)


def _run(optimizer, batches, table):
    """Yields table and state after each batch, which has padding behind what it reads."""
    update, state = jax.jit(optimizer.update), optimizer.init(table)
    for step, (slots, values) in enumerate(batches):
        padded = np.concatenate([slots, len(table) + np.arange(2, dtype=np.int32)])
        gradients = RowGradients(jnp.asarray(padded), jnp.asarray(np.pad(values, ((0, 2), (0, 0)))))
        table, state, *_ = update(gradients, state, table, jnp.asarray(step, jnp.int32), jnp.uint32(step))
        yield np.asarray(table), jax.tree.map(np.asarray, state)


# ---- the definitions


@pytest.mark.parametrize(("name", "second"), CASES)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_rows_follow_the_definition_and_the_rest_keeps_every_bit(name, second, decay):
    batches, table = list(_batches()), _table()
    optimizer, rule = _optimizer(name, second, weight_decay=decay), _rule(name, second, decay)
    definition = row_updates.after_missed_steps if name == "adamw_catch_up" else row_updates.after_step
    before = jax.tree.map(np.asarray, (table, optimizer.init(table)))
    expected = [np.asarray(a, np.float64) for a in jax.tree.leaves(before)]
    for step, ((slots, values), after) in enumerate(
        zip(batches, _run(optimizer, batches, table), strict=True)
    ):
        others = np.setdiff1d(np.arange(ROWS), slots)
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
            chex.assert_trees_all_equal(new[others], old[others])
        for slot, g in zip(slots, values.astype(np.float64), strict=True):
            row = definition(rule, [a[[slot]] for a in expected], g[None], step, _rate(step))
            for array, of_row in zip(expected, row, strict=True):
                array[slot] = of_row[0]
        found, *state = jax.tree.leaves(after)
        chex.assert_trees_all_close(found[slots], expected[0][slots], rtol=1e-4, atol=2e-6)
        for kept, wanted in zip(state, expected[1:], strict=True):
            chex.assert_trees_all_close(kept[slots], wanted[slots], rtol=1e-5, atol=1e-9)
        before = after
    counts = np.bincount(np.concatenate([slots for slots, _ in batches]), minlength=ROWS)
    assert counts.min() < STEPS / 3 and counts.max() > 3  # rows that were missed, and rows read often


# ---- equals in optax


def _dense(transformation, batches, table):
    state = transformation.init(table)
    for slots, values in batches:
        gradient = jnp.zeros_like(table).at[slots].set(values)
        change, state = transformation.update(gradient, state, table)
        table = optax.apply_updates(table, change)
        yield np.asarray(table), state


def _optax(name, decay):
    """Returns the transformation of optax that equals the rule."""
    if name == "adamw":
        return optax.adamw(_rate, B1, B2, EPS, weight_decay=decay)
    if decay:  # these have none of their own; before the learning rate, as in AdamW
        scaled = optax.trace(MOMENTUM) if name == "sgd_momentum" else optax.scale_by_rss(0.0, EPS**2)
        scaled = optax.identity() if name == "sgd" else scaled
        return optax.chain(scaled, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(_rate))
    plain = {
        "sgd": optax.sgd(_rate),
        "sgd_momentum": optax.sgd(_rate, MOMENTUM),
        "adagrad": optax.adagrad(_rate, initial_accumulator_value=0.0, eps=EPS**2),
    }
    return plain[name]


def _both_ways(name, decay):
    """The optimizers of a run, whose dense way is to equal its rows."""
    train = _train(name, weight_decay=decay, learning_rate=0.1, warmup_fraction=0.0, steps=2 * STEPS)
    memory = families.ultramem(placement="1:1", value_lr_multiple=1.0)
    return make_optimizers(RunConfig(ModelConfig(memories={"memory": memory}), train=train))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd_momentum", "adagrad"])
def test_optax_is_the_equal_where_every_row_is_read(name, decay):
    batches = list(_batches(read=ROWS))
    ours = _run(_optimizer(name, weight_decay=decay), batches, _table())
    theirs = _dense(_optax(name, decay), batches, _table())
    for (table, _), (expected, _) in zip(ours, theirs, strict=True):
        chex.assert_trees_all_close(table, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_optax_is_the_equal_on_any_batch_without_decay(name):
    ours = _run(_optimizer(name, weight_decay=0.0), _batches(), _table())
    theirs = _dense(_optax(name, 0.0), _batches(), _table())
    for (table, _), (expected, _) in zip(ours, theirs, strict=True):
        chex.assert_trees_all_close(table, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "decay", "read"),
    [
        *((name, 0.3, ROWS) for name in ROW_OPTIMIZERS if name != "adamw_catch_up"),
        *((name, 0.0, 5) for name in ("sgd", "adagrad", "adagrad_row")),
    ],
)
def test_the_dense_way_of_a_run_is_the_equal_of_its_rows(name, decay, read):
    optimizers = _both_ways(name, decay)
    ours = _run(optimizers.rows["memory_0"], _batches(read=read), _table())
    dense = _dense(optimizers.tables, _batches(read=read), _table())
    for (table, _), (expected, _) in zip(ours, dense, strict=True):
        chex.assert_trees_all_close(table, expected, rtol=1e-5, atol=1e-6)


def test_catching_up_is_adamw_where_every_row_is_read():
    ours = _run(_optimizer("adamw_catch_up"), _batches(read=ROWS), _table())
    adamw = _run(_optimizer("adamw"), _batches(read=ROWS), _table())
    for (table, state), (expected, moments) in zip(ours, adamw, strict=True):
        chex.assert_trees_all_equal(table, expected)
        chex.assert_trees_all_equal(RowMoments(state.first, state.second), moments)
    chex.assert_trees_all_equal(state.last, np.full((ROWS, 1), STEPS))


def test_moments_that_caught_up_are_those_of_optax_with_gradients_of_zero():
    *_, (_, state) = _run(_optimizer("adamw_catch_up"), _batches(), _table())
    *_, (_, (adam, *_)) = _dense(_optax("adamw", 0.1), _batches(), _table())
    # Of the rows that the last step read, which are up to date.
    (*_, (slots, _)) = _batches()
    chex.assert_trees_all_equal(state.last[slots], STEPS)
    chex.assert_trees_all_close(state.first[slots], adam.mu[slots], rtol=1e-5, atol=1e-9)
    chex.assert_trees_all_close(state.second[slots], adam.nu[slots], rtol=1e-5, atol=1e-12)
    *_, (_, rests) = _run(_optimizer("adamw"), _batches(), _table())
    assert not np.allclose(rests.first[slots], adam.mu[slots], rtol=1e-2)


# ---- what the driver does for every rule


@pytest.mark.parametrize(("name", "second"), CASES)
def test_chunks_change_no_bit_and_what_is_overwritten_is_recorded(name, second, monkeypatch):
    options = {} if name in ("sgd", "adagrad_row") else {"row_moment_dtype": "bfloat16"}
    table = to_stored(_table(40), stored_dtype("bfloat16"))
    *_, (_, state) = _run(_optimizer(name, second, **options), _batches(2, 40, 20), table)
    slots = jnp.concatenate([jnp.arange(0, 34, 2), jnp.array([44, 45, 46])]).astype(jnp.int32)
    values = np.random.default_rng(2).standard_normal((20, WIDTH))
    arguments = (
        RowGradients(slots, jnp.asarray(values, jnp.float32)),
        state,
        table,
        jnp.asarray(7),
        jnp.uint32(9),
    )

    def update():
        optimizer = _optimizer(name, second, **options)
        return jax.jit(functools.partial(optimizer.update, record=True))(*arguments)

    whole = update()
    set_chunk_values(monkeypatch, WIDTH * 16 * 6)  # six rows at a time: 20 = 6 + 6 + 6 + 2
    by_chunks = update()
    for field in ("table", "moments", "before"):
        chex.assert_trees_all_equal(getattr(whole, field), getattr(by_chunks, field))
    assert whole.norm == pytest.approx(float(by_chunks.norm), rel=1e-6)
    for rows, array in zip(jax.tree.leaves(whole.before), jax.tree.leaves((table, state)), strict=True):
        chex.assert_type(rows, array.dtype)
        chex.assert_trees_all_equal(rows[:17], array[:34:2])


def test_the_last_step_is_counted_exactly():
    # 2²⁴ + 3 is no float32, and no bfloat16 by far.
    optimizer = _optimizer("adamw_catch_up", row_moment_dtype="bfloat16")
    table = to_stored(_table(), stored_dtype("bfloat16"))
    gradients = RowGradients(jnp.array([2, 5], jnp.int32), jnp.ones((2, WIDTH)))
    step = jnp.asarray(2**24 + 2, jnp.int32)
    _, state, *_ = jax.jit(optimizer.update)(gradients, optimizer.init(table), table, step, jnp.uint32(0))
    chex.assert_type(state.last, jnp.int32)
    chex.assert_type(state.first, jnp.uint16)
    expected = np.zeros((ROWS, 1))
    expected[[2, 5]] = 2**24 + 3
    chex.assert_trees_all_equal(state.last, expected)


@pytest.mark.parametrize("name", ["adamw_catch_up", "adagrad", "adagrad_row", "sgd", "sgd_momentum"])
def test_bfloat16_follows_float32_on_average(name):
    # Steps below a hundredth of the last bit of 1: to nearest nothing would ever happen.
    rate, rows, steps = (lambda step: 2e-5), 512, 20
    options = {} if name in ("sgd", "adagrad_row") else {"row_moment_dtype": "bfloat16"}
    slots, ends = np.arange(rows, dtype=np.int32), {}
    for dtype, kept in (("float32", {}), ("bfloat16", options)):
        optimizer = _optimizer(name, rate=rate, weight_decay=0.0, **kept)
        batches = [(slots, np.full((rows, WIDTH), -1.0, np.float32))] * steps
        table = to_stored(jnp.ones((rows, WIDTH)), stored_dtype(dtype))
        *_, (ends[dtype], _) = _run(optimizer, batches, table)
    moved = ends["float32"].astype(np.float64).mean() - 1
    assert moved > 5e-5
    found = np.asarray(from_stored(jnp.asarray(ends["bfloat16"])), np.float64)
    # A value is 1 or 1 + 1/128: five standard errors of 2,048 of these.
    assert found.mean() - 1 == pytest.approx(moved, abs=5 * np.sqrt(moved / 128 / found.size))


@pytest.mark.parametrize(("name", "second"), [("adagrad_row", "element"), ("adamw_catch_up", "row")])
def test_split_columns_have_the_mean_of_the_whole_row(name, second):
    optimizer, table = _optimizer(name, second), _table()
    slots, values = next(_batches(1))
    gradients = RowGradients(jnp.asarray(slots), jnp.asarray(values))
    arguments = jnp.asarray(0, jnp.int32), jnp.uint32(0)
    whole = jax.jit(optimizer.update)(gradients, optimizer.init(table), table, *arguments)

    def local(gradients, state, table):
        part = TablePart(first_column=jax.lax.axis_index("w") * 2, width_axes=("w",))
        return optimizer.update(gradients, state, table, *arguments, part=part)[:2]

    P = jax.sharding.PartitionSpec
    states = jax.tree.map(lambda a: P(None, "w" if a.shape[1] > 1 else None), optimizer.init(table))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("w",), auto, devices=jax.devices()[:2])
    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(RowGradients(P(), P(None, "w")), states, P(None, "w")),
        out_specs=(P(None, "w"), states),
        check_vma=False,
    )
    ours = jax.jit(split)(gradients, optimizer.init(table), table)
    chex.assert_trees_all_close(ours, tuple(whole[:2]), rtol=1e-6, atol=1e-7)


# ---- configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"row_optimizer": "adagard"}, r"unknown train.row_optimizer 'adagard': did you mean 'adagrad'\?"),
        ({"optimizer": "adam"}, r"unknown train.optimizer 'adam': did you mean 'adamw'\?"),
        (
            {"row_optimizer": "sgd", "row_second_moment": "row"},
            "train.row_second_moment = 'row': must be 'element' while train.row_optimizer is 'sgd'",
        ),
        (
            {"row_optimizer": "adagrad", "row_second_moment": "row"},
            "train.row_second_moment = 'row': must be 'element' while train.row_optimizer is 'adagrad'",
        ),
        (
            {"row_optimizer": "adagrad_row", "row_moment_dtype": "bfloat16"},
            "train.row_moment_dtype = 'bfloat16': must be 'float32' while .*row_optimizer is 'adagrad_row'",
        ),
        (
            {"row_optimizer": "adamw_catch_up", "table_gradient": "dense"},
            "train.table_gradient = 'dense': must be 'row_sparse' while .*row_optimizer is 'adamw_catch_up'",
        ),
        (
            {"momentum": 0.5},
            "momentum = 0.5: must be 0.9 while train.row_optimizer is 'adamw': only 'sgd_momentum' has one",
        ),
        ({"row_optimizer": "sgd_momentum", "momentum": 1.0}, r"train.momentum = 1.0: must be in \[0, 1\)"),
    ],
)
def test_what_a_rule_does_not_have_is_refused_in_a_line(fields, message):
    with pytest.raises(UserError, match=message) as error:
        TrainConfig(**fields)
    assert len(str(error.value).splitlines()) == 1


def test_options_that_a_rule_has_are_taken():
    assert TrainConfig(row_optimizer="sgd_momentum", momentum=0.5, row_moment_dtype="bfloat16")
    assert TrainConfig(row_optimizer="adagrad", row_moment_dtype="bfloat16", row_rounding="nearest")
    assert TrainConfig(row_optimizer="adamw_catch_up", row_second_moment="row", row_moment_dtype="bfloat16")
    assert TrainConfig(row_optimizer="adagrad_row", table_gradient="dense")
