"""State dicts, files and hyper-parameters that no layer can have: each gets one line, and soon."""

import json
import os

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import synthetic
from tests.support.assertions import refused
from ultramem_jax.interop.hyper import Reference
from ultramem_jax.interop.reference_torch import dump, load, read_safetensors, write_safetensors

HYPER = synthetic.CASES["v1_three_heads"]
STATE = synthetic.random_state(HYPER, 0)


def file_of(path, dtype, bits, name="query_norm.weight"):
    """A file of one array (2, 4), written by hand: size of the header, header, data."""
    data = bytes(range(bits))
    header = {name: {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, len(data)]}}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


FOREIGN = {
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
    "F3_OF_TOMORROW": 3,
}


@pytest.mark.parametrize("dtype", FOREIGN)
def test_a_file_of_a_dtype_that_numpy_does_not_know(tmp_path, dtype):
    path = file_of(tmp_path / "m.safetensors", dtype, FOREIGN[dtype])
    said = f"query_norm.weight.dtype = {dtype!r}: must be one of F64, F32, F16, BF16, I64,"
    refused(lambda: read_safetensors(path), str(path), said)
    refused(lambda: load(path, HYPER), str(path), said)


KNOWN = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "C64": "complex64"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}


@pytest.mark.parametrize("dtype", KNOWN)
def test_a_file_of_any_other_dtype_is_read_and_written_again(tmp_path, dtype):
    size = np.dtype(KNOWN[dtype]).itemsize
    path = file_of(tmp_path / "m.safetensors", dtype, 8 * size)
    array = read_safetensors(path)["query_norm.weight"]
    assert array.dtype.name == KNOWN[dtype]
    chex.assert_shape(array, (2, 4))
    assert dtype == "BOOL" or array.tobytes() == bytes(range(8 * size))
    write_safetensors(tmp_path / "again.safetensors", {"x": array})
    again = read_safetensors(tmp_path / "again.safetensors")["x"]
    chex.assert_type(again, array.dtype)
    assert again.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"12", (8).to_bytes(8, "little"), (2**63).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"[]"]
    + [len(t).to_bytes(8, "little") + t for t in (b'{"a": 1}', b'{"a": {}}', b"\xff\xff", b"[" * 10**5)],
)
def test_a_broken_header(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(lambda: load(path, HYPER), "m.safetensors: not a whole .safetensors file")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        refused(lambda path=path: load(path, HYPER), f"{path}: cannot be read: not a regular file")
    refused(lambda: load("a\0b", HYPER), "no such file")
    refused(lambda: write_safetensors(f"{tmp_path}/a\0b", {}), "cannot be written")


def test_what_is_neither_a_file_nor_a_dict():
    for state in (None, [1], 3, b"m.safetensors"):
        refused(
            lambda state=state: load(state, HYPER), "state: must be a dict of arrays by name, or the path of"
        )
        refused(lambda state=state: dump(state, HYPER), "variables: must be a dict of collections")
        refused(lambda state=state: write_safetensors("m", state), "state: must be a dict of arrays by name")
    refused(lambda: load(STATE | {3: 1}, HYPER), "has 3, which the layers do not have")
    refused(lambda: dump(load(STATE, HYPER)[1] | {"memory": {3: {4: 1}}}, HYPER), "has 'memory/3/4'")


WRONG = {
    "complex64": lambda x: x.astype(np.complex64),
    "complex128": lambda x: x.astype(np.complex128),
    "bool": lambda x: x > 0,
    "int64": lambda x: x.astype(np.int64),
    "uint8": lambda x: x.astype(np.uint8),
    "object": lambda x: x.astype(object),
    "datetime64[s]": lambda x: x.astype(np.int64).astype("M8[s]"),
    "str": lambda x: x.astype(str),
    "bytes": lambda x: x.astype("S9"),
}


@pytest.mark.parametrize("dtype", WRONG)
def test_weights_are_floats(dtype):
    for name in ("query_norm.weight", "values_for_look_up", "tucker_core.1", "tucker_core_u"):
        state = STATE | {name: WRONG[dtype](STATE[name])}
        refused(
            lambda state=state: load(state, HYPER),
            f"{name}: must be an array of numbers of a float dtype",
            dtype,
        )


@pytest.mark.parametrize("dtype", ["float32", *sorted(WRONG.keys() - {"int64", "uint8"})])
def test_addresses_are_integers(dtype):
    wrong = WRONG.get(dtype, lambda x: x.astype(np.float32))(STATE["shuffle_index"])
    said = ("shuffle_index.dtype = ", dtype, "must be one of integers")
    refused(lambda: load(STATE | {"shuffle_index": wrong}, HYPER), *said)
    _, variables = load(STATE, HYPER)
    layer = variables["buffers"]["memory_0"] | {"permutation": wrong}
    refused(lambda: dump(variables | {"buffers": {"memory_0": layer}}, HYPER), "permutation.dtype = ", dtype)


@pytest.mark.parametrize("dtype", ["complex64", "bool", "int64", "object", "str"])
def test_variables_are_floats(dtype):
    _, variables = load(STATE, HYPER)
    layer = variables["params"]["memory_0"]
    wrong = layer | {"query": WRONG[dtype](np.asarray(layer["query"]))}
    said = ("params/memory_0/query.dtype = ", dtype, "must be floats")
    refused(lambda: dump(variables | {"params": {"memory_0": wrong}}, HYPER), *said)
    ragged = variables | {"params": {"memory_0": layer | {"query": [[1.0], [1.0, 2.0]]}}}
    refused(lambda: dump(ragged, HYPER), "params/memory_0/query: must be an array of numbers, not a list")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_weights_are_finite_unless_asked_for(value, dtype, tmp_path):
    name = "mem_blocks.1.keys"
    hyper = synthetic.CASES["memory_plus"]
    state = synthetic.random_state(hyper, 0)
    state[name] = state[name].astype(dtype)
    state[name][1, 0, 3] = value
    write_safetensors(tmp_path / "m.safetensors", state)
    for given in (state, tmp_path / "m.safetensors"):
        said = f"{name} = [{value}]: must be finite, 5 of 120 are not; allow_nonfinite=True takes them"
        refused(lambda given=given: load(given, hyper), said)
        _, variables = load(given, hyper, allow_nonfinite=True)
        chex.assert_trees_all_equal(dump(variables, hyper)[name], state[name].astype(np.float32))


def test_a_weight_beyond_float32_is_no_infinity():
    state = STATE | {"query_norm.weight": STATE["query_norm.weight"].astype(np.float64)}
    state["query_norm.weight"][2] = -1e300
    for allow in (False, True):
        refused(
            lambda allow=allow: load(state, HYPER, allow_nonfinite=allow),
            "query_norm.weight = [-1e+300]: must be numbers that float32 can hold",
        )


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float4_e2m1fn", "complex128", "object", "str", "bytes"])
def test_what_could_not_be_read_again_is_not_written(tmp_path, dtype):
    x = np.arange(4.0)
    array = WRONG[dtype](x) if dtype in WRONG else x.astype(jnp.dtype(dtype))
    said = ("wrong.dtype = ", dtype, "cannot be written; allowed are float64, float32, float16, bfloat16, ")
    refused(lambda: write_safetensors(tmp_path / "m", {"right": x, "wrong": array}), *said)
    refused(lambda: write_safetensors(tmp_path / "m", {3: x}), "names must be strings, 3 is not")
    refused(lambda: write_safetensors(tmp_path / "m", {"a": [[1], [1, 2]]}), "a: must be an array of numbers")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hyper", [None, [1, 2], "v1", 3])
def test_hyper_parameters_are_a_dict(hyper):
    for call in (lambda: load(STATE, hyper), lambda: dump({}, hyper), lambda: Reference.of(hyper)):
        refused(call, "hyper: must be a dict of the authors' hyper-parameters, not a ", type(hyper).__name__)


BASES = {"v1": synthetic.V1, "v2": synthetic.V2, "memory_plus": synthetic.MEMORY_PLUS}


@pytest.mark.parametrize("size", [10**9, 10**12, 10**400], ids=["1e9", "1e12", "1e400"])
@pytest.mark.parametrize("layer", BASES)
def test_sizes_that_no_machine_holds_are_refused_at_once(layer, size):
    base = BASES[layer]
    state = synthetic.random_state(base, 0)
    _, variables = load(state, base)
    fields = [name for name, value in base.items() if type(value) is int] + ["mem_layer_num"] * (
        layer == "v2"
    )
    wrong = [{name: size} for name in fields]
    # Together what one does not reach alone: cores divide d_v, and a shape may have several of them.
    for together in (("vdim", "tucker_multihead"), ("head", "kdim", "tucker_rank")):
        wrong.append({name: size for name in together if name in base})
    for change in wrong:
        refused(lambda change=change: load(state, base | change))
        refused(lambda change=change: dump(variables, base | change))
    for field in {"layers", "mem_layer_num", "tucker_multihead"} & {*fields}:
        refused(
            lambda field=field: Reference.of(base | {field: size}), f"hyper.{field} = {size}", "at most 1024"
        )


def test_numbers_that_no_float_holds():
    for field in ("share_ratio", "key_balance_reg_coef", "norm_eps"):
        for value in (10**400, float("inf"), float("nan")):
            change = {field: value}
            refused(
                lambda change=change: Reference.of(synthetic.V2 | change), "must be a number of at least 0"
            )
    for norm in (np.array(["rms", "rms"]), None, ["rms"]):
        refused(lambda norm=norm: Reference.of(HYPER | {"norm": norm}), "hyper.norm = ", "must be 'rms'")


def test_a_file_of_another_model_is_not_listed_whole():
    message = refused(lambda: load({f"a{i}": 0 for i in range(1000)}, HYPER), "has no 'query_norm.weight'")
    assert " and 992 more, which the layers do not have" in message and len(message) < 500
