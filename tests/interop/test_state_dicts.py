"""The authors' state dicts go in and out: dtypes, files, and the errors that name what is wrong."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import synthetic
from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import UserError
from ultramem_jax.interop.constant import Constant
from ultramem_jax.interop.hyper import Reference
from ultramem_jax.interop.reference_torch import dump, load, read_safetensors, write_safetensors


@pytest.mark.parametrize("dtype", (np.float64, np.float16, jnp.bfloat16))
def test_other_floats_become_float32(dtype):
    hyper = synthetic.CASES["v1_three_heads"]
    state = {
        k: v if v.dtype == np.int64 else v.astype(dtype) for k, v in synthetic.random_state(hyper, 0).items()
    }
    _, variables = load(state, hyper)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    back = dump(variables, hyper)
    for name, array in state.items():
        chex.assert_trees_all_equal(
            back[name], array if array.dtype == np.int64 else array.astype(np.float32)
        )


def test_a_table_made_for_more_layers_than_the_state_has():
    hyper = synthetic.V2 | dict(mem_layer_num=3, layers=2)
    state = synthetic.random_state(synthetic.V2, 0)
    x = np.random.default_rng(0).normal(size=(3, 1, 2, 10)).astype(np.float32)
    whole, variables = load(state, synthetic.V2)
    first, of_first = load({k: v for k, v in state.items() if not k.startswith("mem_blocks.2.")}, hyper)
    expected = jax.jit(whole.apply)(variables, x)[:2]
    chex.assert_trees_all_close(jax.jit(first.apply)(of_first, x[:2]), expected, rtol=1e-5, atol=1e-6)


def test_numbers_that_follow_from_others_are_passed_over():
    extra = dict(arrays={}, effective_knum=99, key_num=99, norm="rms", norm_affine=True, knum=np.int64(6))
    assert Reference.of(synthetic.V2 | extra) == Reference.of(synthetic.V2)


@pytest.mark.parametrize("name", ("v1_three_heads", "v2_everything", "memory_plus"))
def test_every_missing_entry_is_named(name):
    hyper = synthetic.CASES[name]
    state = synthetic.random_state(hyper, 0)
    for entry in state:
        with pytest.raises(UserError) as error:
            load({k: v for k, v in state.items() if k != entry}, hyper)
        assert str(error.value) == f"the state dict has no {entry!r}"
        with pytest.raises(UserError) as error:
            load(state | {entry: state[entry][..., :-1]}, hyper)
        assert str(error.value).startswith(f"{entry}.shape = ") and str(state[entry].shape) in str(
            error.value
        )


def test_wrong_entries_are_named():
    hyper = synthetic.CASES["v1_three_heads"]
    state = synthetic.random_state(hyper, 0)
    with pytest.raises(UserError, match=r"has no 'keys'; it has 'key', which the layers do not have"):
        load({"key" if k == "keys" else k: v for k, v in state.items()}, hyper)
    for name, value, message in (
        ("query_norm.weight", ["a"] * 5, "query_norm.weight: must be an array of numbers"),
        ("shuffle_index", state["shuffle_index"] * 1.0, "shuffle_index.dtype = 'float64'"),
        ("shuffle_index", state["shuffle_index"] + 1, r"shuffle_index = .* within \[0, 144\)"),
    ):
        with pytest.raises(UserError, match=message):
            load(state | {name: value}, hyper)


def test_wrong_variables_are_named():
    hyper = synthetic.CASES["v1_three_heads"]
    _, variables = load(synthetic.random_state(hyper, 0), hyper)
    params = variables["params"]["memory_0"]
    for layer, message in (
        ({k: v for k, v in params.items() if k != "cores"}, "has no 'params/memory_0/cores'"),
        (params | {"gate": params["query"]}, "has 'params/memory_0/gate'"),
        (
            params | {"keys": params["keys"][:1]},
            r"params/memory_0/keys.shape = .* must be \(2, 3, 2, 12, 5\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            dump(variables | {"params": {"memory_0": layer}}, hyper)
    equal = dump(variables | {"reads": {"memory_0": {}}}, hyper)
    assert set(equal) == set(synthetic.random_state(hyper, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (dict(layer="v3"), "unknown hyper.layer 'v3'"),
        (dict(norm="layer"), "hyper.norm = 'layer'"),
        (dict(norm_affine=False), "hyper.norm_affine = False"),
        (dict(knum=0), "hyper.knum = 0: must be an integer of at least 1"),
        (dict(head=2.0), "hyper.head = 2.0: must be an integer"),
        (dict(norm_eps="small"), "hyper.norm_eps = 'small': must be a number"),
        (dict(share_ratio=1.5), "share_ratio = 1.5"),
        (dict(use_glu_act=1), "hyper.use_glu_act = 1: must be true or false"),
        (
            dict(value_expand_time=3),
            "hyper.value_expand_time = 3: must be 1 or the square of key_expand_time",
        ),
        (dict(layer="v1", value_expand_time=3), "hyper.value_expand_time = 3: must be a square"),
        (dict(mem_layer_num=2), "hyper.mem_layer_num = 2: must be an integer of at least 3"),
        (dict(knn=50), "top_m = 50"),
    ),
)
def test_wrong_hyper_parameters_are_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        load({}, synthetic.V2 | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hyper", (synthetic.V1, synthetic.V2, synthetic.MEMORY_PLUS))
def test_every_missing_hyper_parameter_is_named(hyper):
    for field in hyper.keys() - {"norm_eps"}:
        with pytest.raises(UserError, match=f"hyper has no '{field}'"):
            load({}, {k: v for k, v in hyper.items() if k != field})


@pytest.mark.parametrize("hyper", (synthetic.V1, synthetic.V2, synthetic.MEMORY_PLUS))
def test_hyper_parameters_that_may_be_left_out(hyper):
    whole = Reference.of(hyper | dict(norm_eps=1e-5, norm="rms", norm_affine=True))
    assert Reference.of({k: v for k, v in hyper.items() if k != "norm_eps"}) == whole
    assert whole.norm_eps == ModelConfig().norm_eps and whole.num_memories == whole.num_layers
    assert Reference.of(hyper | dict(norm_eps=1e-3)).norm_eps == 1e-3


def test_safetensors(tmp_path):
    hyper = synthetic.CASES["v2_everything"]
    state = synthetic.random_state(hyper, 0)
    state["mem_blocks.0.shuffle_index"] = state["mem_blocks.0.shuffle_index"].astype(np.int32)
    path = tmp_path / "new" / "memory.safetensors"
    write_safetensors(path, {k: np.asfortranarray(v) for k, v in state.items()})
    synthetic.equal_states(read_safetensors(path), state)
    write_safetensors(path, dump(load(path, hyper)[1], hyper))
    synthetic.equal_states(read_safetensors(str(path)), state)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_that_cannot_be_read_or_written(tmp_path):
    path = tmp_path / "broken.safetensors"
    write_safetensors(path, {"a": np.arange(100.0)})
    path.write_bytes(path.read_bytes()[:-8])
    for wrong, message in (
        (path, "broken.safetensors: not a whole .safetensors file"),
        (tmp_path / "none", "none: no such file"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(wrong, synthetic.V1)
        assert "\n" not in str(error.value)
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(path / "file", {"a": np.zeros(1)})
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(path, {"a": np.zeros(1, np.dtype("M8[s]"))})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_constant():
    constant, same = Constant(np.arange(3)), Constant(range(3))
    assert constant == same and hash(constant) == hash(same)
    chex.assert_shape(constant, (3,))
    assert constant != Constant(np.arange(3, dtype=np.int32)) and constant != Constant([0, 1, 3])
    assert constant != "other" and repr(constant) == "Constant(shape=(3,), dtype=int64)"
    assert jax.tree.leaves(constant) == [] and jax.tree.map(jnp.sin, constant) is constant
    chex.assert_type(jnp.asarray(constant), jnp.int32)
    with pytest.raises(ValueError, match="read-only"):
        constant.value[0] = 1
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)  # `same` does not compile again, the other numbers do
    def double(tree):
        return tree | {"x": 2 * tree["x"]}

    for node in (constant, same, Constant([0, 1, 3])):
        assert double({"x": jnp.ones(()), "c": node})["c"] == node
