"""Sparse memory fine-tuning: the rows that are chosen are the definition's, and all others keep every bit."""

import math
import shutil
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import mesh_step
from tests.support.drawn import drawn_state
from tests.support.small_run import scalars
from tests.support.step_models import MODEL, token_batches
from ultramem_jax.config import RunConfig, TrainConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.errors import UserError
from ultramem_jax.models import Transformer
from ultramem_jax.nested import leaves
from ultramem_jax.ops.lookup import GradientsOfReads, row_gradients, rows_read
from ultramem_jax.presets import families
from ultramem_jax.training.background import (
    BackgroundReads,
    count_reads,
    load_background,
    save_background,
)
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.loop import train
from ultramem_jax.training.lora import merged
from ultramem_jax.training.row_rules import row_rule
from ultramem_jax.training.row_sparse import row_sparse, update_by_reads
from ultramem_jax.training.slot_selection import Selection, background_weights, kept_rows
from ultramem_jax.training.state import model_variables
from ultramem_jax.training.step import make_train_step

SCORES = ("tf_idf", "kl", "reads")
SLOTS = 60


def scores_by_definition(score, counts, background):
    """Scores of all N slots in float64, from the formulas of the papers."""
    share = counts / counts.sum()
    if score == "reads":
        return counts.astype(np.float64)
    if score == "tf_idf":
        return share * np.log((background.num_batches + 1) / (background.batches + 1))
    q = (background.reads + 1) / (background.reads + 1).sum()
    return np.array(
        [p * math.log(p / of_background) if p else 0.0 for p, of_background in zip(share, q, strict=True)]
    )


def chosen_by_definition(score, slots, background, most, num_slots):
    """The slots that a step may change, as a set."""
    counts = np.bincount(np.asarray(slots).reshape(-1), minlength=num_slots)
    scores = scores_by_definition(score, counts, background)
    read = np.flatnonzero(counts)
    return {int(slot) for slot in read[np.argsort(-scores[read], kind="stable")][:most]}


def some_background(num_slots, seed=0):
    rng = np.random.default_rng(seed)
    batches = rng.integers(0, 21, num_slots).astype(np.int32)
    return BackgroundReads(batches, batches * rng.integers(1, 9, num_slots).astype(np.int32), 20)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("most", [1, 7, 100])
def test_the_choice_is_the_definitions(score, most):
    background = some_background(SLOTS)
    weights = None if score == "reads" else jnp.asarray(background_weights(background, score))
    select = jax.jit(partial(Selection(score, most), num_slots=SLOTS), static_argnums=1)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        slots = (rng.integers(0, SLOTS, (12, 4)) // rng.integers(1, 4, (12, 4))).astype(np.int32)
        rows, metrics = select(rows_read(jnp.asarray(slots), SLOTS), slots.size, background=weights)
        expected = chosen_by_definition(score, slots, background, most, SLOTS)
        kept = np.asarray(rows.slots)[np.asarray(rows.counts) > 0]
        assert kept.tolist() == sorted(expected)
        assert (np.diff(rows.slots) > 0).all() and (np.asarray(rows.slots)[len(kept) :] >= SLOTS).all()
        of_expected = np.isin(slots, list(expected)).sum()
        assert float(metrics["selected_reads_share"]) == pytest.approx(of_expected / slots.size)


def test_reads_of_the_rows_kept_are_theirs():
    rng = np.random.default_rng(1)
    slots = rng.integers(0, 30, (20, 5)).astype(np.int32)
    weights, cotangent = rng.standard_normal((20, 5, 2)), rng.standard_normal((20, 1, 6))
    rows = rows_read(jnp.asarray(slots), 30)
    numbers = [0, 3, 4, 11, len(np.unique(slots)) - 1]
    expected = np.zeros((30, 6))
    for token, read in np.ndindex(slots.shape):
        expected[slots[token, read]] += np.repeat(weights[token, read], 3) * cotangent[token, 0]
    for missing in (0, 4):
        kept = jnp.asarray(numbers + [rows.slots.shape[0]] * missing, jnp.int32)
        of_kept = kept_rows(rows, kept, 30)
        gradients = row_gradients(
            GradientsOfReads(
                of_kept,
                jnp.zeros_like(jnp.asarray(slots)),
                jnp.asarray(weights, jnp.float32),
                jnp.asarray(cotangent, jnp.float32),
            )
        )
        chosen = np.unique(slots)[numbers]
        assert gradients.slots[:5].tolist() == chosen.tolist() and (gradients.slots[5:] >= 30).all()
        chex.assert_trees_all_close(gradients.values[:5], expected[chosen], rtol=1e-5, atol=1e-6)


RULES = {
    "adamw": {},
    "a moment of the row": dict(row_second_moment="row"),
    "catching up": dict(row_optimizer="adamw_catch_up"),
    "adagrad": dict(row_optimizer="adagrad"),
    "row-wise adagrad": dict(row_optimizer="adagrad_row"),
    "sgd": dict(row_optimizer="sgd"),
    "momentum": dict(row_optimizer="sgd_momentum"),
}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_updates_the_chosen_rows_as_if_all_were_updated(name, kernels, request):
    if not kernels:
        request.getfixturevalue("without_kernels")
    rng = np.random.default_rng(0)
    slots = jnp.asarray(rng.integers(0, 40, (16, 3)), jnp.int32)
    rows = rows_read(slots, 40)
    reads = GradientsOfReads(
        rows,
        jnp.zeros_like(slots),
        jnp.asarray(rng.standard_normal((16, 3, 1)), jnp.float32),
        jnp.asarray(rng.standard_normal((16, 1, 4)), jnp.float32),
    )
    optimizer = row_sparse(row_rule(TrainConfig(**RULES[name])), lambda step: 0.1)
    table = jnp.asarray(rng.standard_normal((40, 4)), jnp.float32)
    state = jax.tree.map(lambda a: (a + rng.uniform(0, 2, a.shape)).astype(a.dtype), optimizer.init(table))
    update = jax.jit(partial(update_by_reads, optimizer, record=True))
    arguments = state, table, jnp.asarray(3), np.uint32(1)
    some, _ = jax.jit(partial(Selection("reads", 6), num_slots=40), static_argnums=1)(
        rows, slots.size, background=None
    )
    whole, after = update(reads, *arguments), update(reads._replace(rows=some), *arguments)
    chosen = np.asarray(some.slots[:6])
    others = np.setdiff1d(np.arange(40), chosen)
    for array, of_whole, before in zip(
        *(jax.tree.leaves(tree) for tree in (after[:2], whole[:2], (table, state))), strict=True
    ):
        chex.assert_trees_all_close(array[chosen], of_whole[chosen], rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(array[others], before[others])
    chex.assert_trees_all_equal(after.before[0][:6], table[chosen])


MANY = replace(
    MODEL,
    memories={
        "ultramem": families.ultramem(
            placement="1:2", num_keys=16, top_m=4, num_heads=2, key_dim=8, value_dim=8
        ),
        "plus": families.memory_plus(
            placement="1:1/2:2", num_keys=16, top_m=3, num_heads=2, key_dim=8, value_dim=8
        ),
    },
)
"""Tables of 256 slots of which a step reads a part, one of them read by two memories."""
FROZEN = TrainConfig(
    steps=50,
    batch_size=4,
    grad_accumulation=2,
    learning_rate=1e-2,
    trainable="/values$",
    slots_per_step=5,
    background="counts.npz",
)


@pytest.mark.parametrize(
    ("score", "kernels", "dtype"),
    [("tf_idf", True, "float32"), ("kl", True, "bfloat16"), ("tf_idf", False, "float32")],
)
def test_fifty_steps_change_the_chosen_rows_and_nothing_else(score, kernels, dtype, request):
    if not kernels:
        request.getfixturevalue("without_kernels")
    memories = {name: memory.changed(dtype=dtype) for name, memory in MANY.memories.items()}
    model = replace(MANY, memories=memories)  # rows in bfloat16 are rounded at random
    config = RunConfig(model, train=replace(FROZEN, slot_score=score))
    backgrounds = {"ultramem_0": some_background(256, 1), "plus_tables": some_background(256, 2)}
    weights = {name: jnp.asarray(background_weights(of, score)) for name, of in backgrounds.items()}
    step = jax.jit(make_train_step(config, make_optimizers(config)), donate_argnums=0)
    reads_of = jax.jit(partial(Transformer(model).apply, mutable=["reads"]))
    state = drawn_state(config).replace(background=weights)
    start = jax.tree.map(np.asarray, state)
    ever: dict[str, set[int]] = {name: set() for name in backgrounds}
    for tokens in token_batches(50, 4):
        _, sown = reads_of(model_variables(state), tokens[:, :-1])
        before = jax.tree.map(np.asarray, state.tables)
        state, metrics = step(state, tokens)
        for name, memories in {"ultramem_0": ["ultramem_0"], "plus_tables": ["plus_0", "plus_1"]}.items():
            slots = np.concatenate([np.asarray(sown["reads"][memory]["slots"]) for memory in memories])
            chosen = chosen_by_definition(score, slots, backgrounds[name], 5, 256)
            moved = (np.asarray(state.tables[name]["values"]) != before[name]["values"]).any(1)
            moved = set(np.flatnonzero(moved).tolist())
            assert moved <= chosen and (
                moved == chosen or dtype == "bfloat16"
            )  # a small step may round to none
            assert float(metrics[f"{name}/selected_reads_share"]) == pytest.approx(
                np.isin(slots, list(chosen)).sum() / slots.size
            )
            ever[name] |= chosen
    end = jax.tree.map(np.asarray, state)
    chex.assert_trees_all_equal((end.params, end.background), (start.params, start.background))
    for name, chosen in ever.items():
        others = np.setdiff1d(np.arange(256), list(chosen))
        assert 20 < len(others) < 251  # there is something to keep, and more than one step's rows changed
        ours, theirs = ((s.tables[name], s.table_state[name]) for s in (end, start))
        for array, before in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert array[others].tobytes() == before[others].tobytes()
            changed = (array[list(chosen)] != before[list(chosen)]).any(1)
            assert changed.all() or (dtype == "bfloat16" and changed.mean() > 0.9)


ENGRAM = replace(
    MODEL,
    memories={
        "engram": families.engram(
            placement="before@2", heads_per_order=2, rows_per_head=(64,), value_dim=4, num_canonical_ids=11
        )
    },
)


@pytest.mark.parametrize(
    ("model", "settings"),
    [(ENGRAM, {}), (MANY, dict(trainable="/values$|^lora/", lora_rank=2, grad_accumulation=1))],
    ids=["n-grams, counted background", "with LoRA"],
)
def test_three_steps_change_the_chosen_rows(model, settings):
    config = RunConfig(model, train=replace(FROZEN, **settings))
    state = drawn_state(config)
    tables = list(state.tables)
    backgrounds = count_reads(
        model, model_variables(state), (tokens[:, :-1] for tokens in token_batches(4, 2))
    )
    weights = {name: jnp.asarray(background_weights(of, "tf_idf")) for name, of in backgrounds.items()}
    state = state.replace(background=weights)
    step = jax.jit(make_train_step(config, make_optimizers(config)))
    reads_of = jax.jit(partial(Transformer(model).apply, mutable=["reads"]))
    start, readers = state, table_readers(model)
    for tokens in token_batches(3, 4, seed=5):
        _, sown = reads_of(merged(model_variables(state), config.train), tokens[:, :-1])
        after, _ = step(state, tokens)
        for name in tables:
            read = [np.asarray(sown["reads"][site.name]["slots"]) for site in readers[name]]
            slots, num_slots = np.concatenate(read), readers[name][0].num_slots
            chosen = chosen_by_definition("tf_idf", slots, backgrounds[name], 5, num_slots)
            for before, now in ((state.tables, after.tables), (state.table_state, after.table_state)):
                for old, new in zip(*(jax.tree.leaves(of[name]) for of in (before, now)), strict=True):
                    moved = (np.asarray(old) != np.asarray(new)).any(1)
                    assert set(np.flatnonzero(moved).tolist()) == chosen
        state = after
    before, now = (dict(leaves(of.params)) for of in (start, state))
    changed = {
        path[0] for path, array in before.items() if (np.asarray(array) != np.asarray(now[path])).any()
    }
    assert changed == ({"lora"} if settings else set())


def test_a_halted_step_changes_no_row():
    config = RunConfig(MANY, train=replace(FROZEN, grad_accumulation=1))
    step = jax.jit(make_train_step(config, make_optimizers(config)))
    state, (tokens,) = drawn_state(config), token_batches(1, 4)
    for halted in (False, True):
        after, _ = step(state, tokens, jnp.asarray(halted))
        same = jax.tree.map(
            lambda ours, before: np.asarray(ours).tobytes() == np.asarray(before).tobytes(),
            (after.tables, after.table_state),
            (state.tables, state.table_state),
        )
        assert all(of is halted for of in jax.tree.leaves(same))


MESHES = {
    "slots and columns": mesh_step.BOTH,
    "the same tokens on all owners": mesh_step.SAME_TOKENS,
    "pre-values in a ring, micro-batches": mesh_step.MICRO_BATCHES,
}


@pytest.mark.parametrize(
    ("name", "score", "most"),
    [
        ("slots and columns", "tf_idf", 5),
        ("the same tokens on all owners", "reads", 1),
        ("pre-values in a ring, micro-batches", "kl", 11),
    ],
)
def test_a_mesh_selects_the_rows_of_one_device(name, score, most):
    config = MESHES[name]
    chosen = dict(slots_per_step=most, slot_score=score, background="" if score == "reads" else "counts.npz")
    config = replace(config, train=replace(config.train, row_optimizer="sgd", **chosen))
    alone, *_, expected = mesh_step.run(config, 3, alone=True)
    there, *_, metrics = mesh_step.run(config, 3)
    start = mesh_step.start(config.model, config.train)
    for ours, theirs, before in zip(
        *(jax.tree.leaves(state.tables) for state in (there, alone, start)), strict=True
    ):
        moved = [(np.asarray(table) != before).any(1) for table in (ours, theirs)]
        chex.assert_trees_all_equal(*moved)
        assert 0 < moved[0].sum() <= 3 * most
    chex.assert_trees_all_close(there.tables, alone.tables, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(metrics, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "a moment of the row", "row-wise adagrad"])
def test_a_mesh_leaves_every_bit_of_the_other_rows(rule):
    selecting = dict(slots_per_step=3, slot_score="tf_idf", background="counts.npz")
    config = replace(mesh_step.BOTH, train=replace(mesh_step.TRAIN, **selecting, **RULES[rule]))
    alone, *_ = mesh_step.run(config, 3, alone=True)
    there, *_ = mesh_step.run(config, 3)
    start = mesh_step.start(config.model, config.train)
    ours, theirs, before = (
        jax.tree.map(np.asarray, (state.tables, state.table_state)) for state in (there, alone, start)
    )
    (values,), (values_before,) = (jax.tree.leaves(state[0]) for state in (ours, before))
    moved = (values != values_before).any(1)
    assert 3 <= moved.sum() <= 9 < len(moved)
    for array, of_alone, at_start in zip(*map(jax.tree.leaves, (ours, theirs, before)), strict=True):
        assert array[~moved].tobytes() == of_alone[~moved].tobytes() == at_start[~moved].tobytes()
        chex.assert_trees_all_close(array[moved], of_alone[moved], rtol=1e-3, atol=1e-5)


# ---- background reads


def counted(model=MANY, batches=3):
    state = drawn_state(RunConfig(model))
    texts = [np.asarray(tokens[:, :-1]) for tokens in token_batches(batches, 2)]
    return model_variables(state), texts, count_reads(model, model_variables(state), iter(texts))


def test_background_reads_are_counted_as_by_hand():
    variables, texts, background = counted()
    expected = {name: np.zeros((2, 256), np.int64) for name in background}
    for tokens in texts:
        _, sown = Transformer(MANY).apply(variables, tokens, mutable=["reads"])
        for name, memories in {"ultramem_0": ["ultramem_0"], "plus_tables": ["plus_0", "plus_1"]}.items():
            for_all = np.concatenate([np.asarray(sown["reads"][memory]["slots"]) for memory in memories])
            of_batch = np.bincount(for_all.reshape(-1), minlength=256)
            expected[name] += [of_batch > 0, of_batch]
    assert set(background) == {"ultramem_0", "plus_tables"}
    for name, of in background.items():
        chex.assert_trees_all_equal(np.stack([of.batches, of.reads]), expected[name].astype(np.int32))
        assert of.num_batches == 3 and 0 < (of.batches > 0).sum() < 256


def test_parts_of_a_batch_count_as_the_batch():
    _, _, whole = counted()
    variables, texts, _ = counted(batches=3)
    parts = count_reads(MANY, variables, iter(texts), micro_batches=2)
    chex.assert_trees_all_equal(parts, whole)
    with pytest.raises(UserError, match=r"micro_batches = 0: must be at least 1"):
        count_reads(MANY, variables, [], micro_batches=0)


def test_a_file_of_background_reads_comes_back_or_is_refused(tmp_path):
    _, _, background = counted(batches=1)
    path = tmp_path / "counts.npz"
    save_background(path, background, {"corpus": "stdlib"})
    chex.assert_trees_all_equal(load_background(path)[0], background)
    assert [file.name for file in tmp_path.iterdir()] == ["counts.npz"]
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=r"^train\.background = '.*counts\.npz': must be a file that the"):
            load_background(path)
    ours = background["ultramem_0"]
    for wrong in (
        ours._replace(batches=ours.batches[:-1]),
        ours._replace(batches=ours.batches[:, None], reads=ours.reads[:, None]),
        ours._replace(reads=ours.reads.astype(np.float32)),
        ours._replace(num_batches=0),
        ours._replace(num_batches="x"),
    ):
        save_background(path, background | {"ultramem_0": wrong}, {"num_batches": wrong.num_batches})
        with pytest.raises(UserError, match=r"must be a file that the command .*: (other|counts)"):
            load_background(path)
    with pytest.raises(UserError, match=r"tables = 0: must be at least 1"):
        save_background(path, {}, {})
    with pytest.raises(UserError, match=r"nowhere/counts\.npz: No such file or directory"):
        save_background(tmp_path / "nowhere" / "counts.npz", background, {})
    with pytest.raises(UserError, match=r"model\.memories = \{\}: must name a memory"):
        count_reads(MODEL, {}, [])
    with pytest.raises(UserError, match=r"batches = 0: must be at least 1"):
        count_reads(MANY, {}, [])


def test_a_run_selects_by_its_file_and_resumes_without_it(config, tmp_path):
    slots = config.model.memory.address.num_keys**2
    path = tmp_path / "counts.npz"
    save_background(path, {"memory_0": some_background(slots)}, {})
    selecting = replace(config.train, slots_per_step=4, background=str(path), trainable="values$")
    config = replace(config, train=selecting)
    whole = train(config, tmp_path / "whole", progress=False)
    on_host = config.model.memory.changed(memory_kind="pinned_host")
    on_host = replace(config, model=replace(config.model, memories={"memory": on_host}))
    there = train(on_host, tmp_path / "on_host", progress=False)
    chex.assert_trees_all_close(there.state.tables, whole.state.tables, rtol=1e-5, atol=1e-6)
    shares = [record.get("memory_0/selected_reads_share") for record in scalars(tmp_path / "whole")]
    assert all(0 < share < 0.5 for share in shares if share is not None) and shares.count(None) == 2
    parts = tmp_path / "parts"
    train(replace(config, train=replace(selecting, steps=2)), parts, progress=False)
    with pytest.raises(UserError, match=r"train\.slots_per_step = 5: must stay 4, as .* began"):
        train(replace(config, train=replace(selecting, slots_per_step=5)), parts, progress=False)
    # The checkpoint holds what the run took from the file. (Learning rates depend on the number of steps.)
    path.unlink()
    half = replace(config, train=replace(selecting, checkpoint_every=3))
    with pytest.raises(UserError, match=r"counts\.npz': must be a file that the command"):
        train(half, tmp_path / "fresh", progress=False)
    resumed = train(config, parts, progress=False)
    assert resumed.step == whole.step == 6
    chex.assert_trees_all_equal(resumed.state.background, whole.state.background)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "6")  # as if it had been cut off at step 4
    again = train(config, tmp_path / "whole", progress=False)
    chex.assert_trees_all_equal(again.state, whole.state)


def test_a_file_of_another_model_is_refused(config, tmp_path):
    path = tmp_path / "counts.npz"
    save_background(path, {"memory_0": some_background(100)}, {})
    selecting = replace(config.train, slots_per_step=4, background=str(path))
    with pytest.raises(UserError, match=r"counts\.npz': must count the reads of this model, with slots by t"):
        train(replace(config, train=selecting), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(slots_per_step=-1), r"train\.slots_per_step = -1: must be at least 0"),
        (dict(slots_per_step=3), r"train\.background = '': must name the file of background reads"),
        (dict(background="x"), r"train\.background = 'x': must be empty while train\.slots_per_step is 0"),
        (
            dict(slots_per_step=3, slot_score="reads", background="x"),
            r"train\.background = 'x': must be empty while train\.slot_score is 'reads'",
        ),
        (dict(slot_score="kl"), r"train\.slot_score = 'kl': must be 'tf_idf' while train\.slots_per_step"),
        (
            dict(slots_per_step=3, slot_score="reads", table_gradient="dense"),
            r"train\.table_gradient = 'dense': must be 'row_sparse' while train\.slots_per_step is above 0",
        ),
    ],
)
def test_settings_that_do_nothing_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**fields)


def test_a_selection_needs_a_table_that_learns():
    selecting = TrainConfig(slots_per_step=3, slot_score="reads")
    with pytest.raises(UserError, match=r"train\.slots_per_step = 3: must be 0 without a memory"):
        RunConfig(MODEL, train=selecting)
    with pytest.raises(UserError, match=r"train\.trainable = 'attention': must match a table, such as"):
        drawn_state(RunConfig(MANY, train=replace(selecting, trainable="attention")))
