"""What goes in and out of the authors' state dicts: dtypes, files, and the errors that name what is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import synthetic
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
        np.testing.assert_array_equal(
            back[name], array if array.dtype == np.int64 else array.astype(np.float32)
        )


def test_a_table_made_for_more_layers_than_the_state_has():
    hyper = synthetic.V2 | dict(mem_layer_num=3, layers=2)
    state = synthetic.random_state(synthetic.V2, 0)
    x = np.random.default_rng(0).normal(size=(3, 1, 2, 10)).astype(np.float32)
    whole, variables = load(state, synthetic.V2)
    first, of_first = load({k: v for k, v in state.items() if not k.startswith("mem_blocks.2.")}, hyper)
    expected = jax.jit(whole.apply)(variables, x)[:2]
    np.testing.assert_allclose(jax.jit(first.apply)(of_first, x[:2]), expected, rtol=1e-5, atol=1e-6)


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
    assert constant == same and hash(constant) == hash(same) and constant.shape == (3,)
    assert constant != Constant(np.arange(3, dtype=np.int32)) and constant != Constant([0, 1, 3])
    assert constant != "other" and repr(constant) == "Constant(shape=(3,), dtype=int64)"
    assert jax.tree.leaves(constant) == [] and jax.tree.map(jnp.sin, constant) is constant
    assert jnp.asarray(constant).dtype == jnp.int32
    with pytest.raises(ValueError, match="read-only"):
        constant.value[0] = 1
    traces = []

    @jax.jit
    def double(tree):
        traces.append(tree)
        return tree | {"x": 2 * tree["x"]}

    for node in (constant, same, Constant([0, 1, 3])):
        assert double({"x": jnp.ones(()), "c": node})["c"] == node
    assert len(traces) == 2


FOREIGN = {"F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75}
"""Dtypes that the format has and NumPy has not, with the bytes of a number."""


def _file_of(path, dtype, num_bytes):
    """A file of four numbers, byte by byte: the length of a header of JSON, the header, the data."""
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, num_bytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))
    return path


@pytest.mark.parametrize("dtype", FOREIGN)
def test_dtypes_that_numpy_does_not_have_are_named(tmp_path, dtype):
    path = _file_of(tmp_path / "memory.safetensors", dtype, int(4 * FOREIGN[dtype]))
    with pytest.raises(UserError) as error:
        read_safetensors(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and dtype in message and "\n" not in message
    with pytest.raises(UserError):
        load(path, synthetic.V1)


@pytest.mark.parametrize(
    ("dtype", "width", "expected"),
    [("BF16", 2, jnp.bfloat16), ("F16", 2, np.float16), ("F64", 8, np.float64), ("I8", 1, np.int8)],
)
def test_dtypes_that_numpy_has_are_read(tmp_path, dtype, width, expected):
    array = read_safetensors(_file_of(tmp_path / "memory.safetensors", dtype, 4 * width))["w"]
    assert array.dtype == np.dtype(expected) and not array.any() and array.shape == (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a + 1j, "must be an array of numbers, floats or integers, not of complex128"),
        (lambda a: a.astype(np.complex64), "not of complex64"),
        (lambda a: a > 0, "not of bool"),
        (lambda a: a.astype(str), "not of <U"),
        (lambda a: a.astype(object), "not of object"),
        (lambda a: None, "not of object"),
        (lambda a: np.where(a == a.flat[0], np.nan, a), "'1 of 5 are NaN or infinite': must be finite"),
        (lambda a: np.where(a == a.flat[0], a, -np.inf), "'4 of 5 are NaN or infinite': must be finite"),
        (lambda a: a * 1e300, "are NaN or infinite': must be finite as float32"),
    ],
)
def test_what_is_no_finite_number_is_refused(change, message):
    hyper = synthetic.CASES["v1_three_heads"]
    state = {name: np.asarray(array, np.float64) for name, array in synthetic.random_state(hyper, 0).items()}
    state["shuffle_index"] = state["shuffle_index"].astype(np.int64)
    name = "query_norm.weight"
    with np.errstate(over="ignore"), pytest.raises(UserError) as error:
        load(state | {name: change(state[name] + 1.0)}, hyper)
    assert str(error.value).startswith(name) and message in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_taken_if_asked_for():
    hyper = synthetic.CASES["v1_three_heads"]
    state = synthetic.random_state(hyper, 0)
    state["values_proj.weight"] = np.full_like(state["values_proj.weight"], np.nan)
    _, variables = load(state, hyper, allow_nonfinite=True)
    assert np.isnan(variables["params"]["memory_0"]["projection"]).all()
    synthetic.equal_states(dump(variables, hyper), state)


@pytest.mark.parametrize("hyper", [None, [], "v1", 3, [("layer", "v1")]])
def test_hyper_parameters_are_a_dict(hyper):
    with pytest.raises(UserError, match=r"^hyper = .*: must be a dict of hyper-parameters"):
        load({}, hyper)


@pytest.mark.parametrize("value", [10**9, 10**12, 10**20])
@pytest.mark.parametrize("hyper", (synthetic.V1, synthetic.V2, synthetic.MEMORY_PLUS))
def test_absurd_hyper_parameters_are_refused_at_once(hyper, value):
    for name in (name for name, known in hyper.items() if type(known) is int):
        with pytest.raises(UserError) as error:
            load({}, hyper | {name: value})
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"hyper\.mem_layer_num = .* at most 16384"):
        load({}, synthetic.V2 | dict(mem_layer_num=value))
