"""Whole models of the authors' code: logits against a forward pass in NumPy, and refusals."""

import base64
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from tests.support.assertions import assert_close_by_size
from tests.support.olmo_oracle import (
    CASES,
    EXPERTS,
    HEADS,
    KV_HEADS,
    ROWS,
    TOP,
    V2,
    WIDTH,
    Case,
    forward,
    random_state,
    section,
)
from ultramem_jax.config.model import MoEConfig
from ultramem_jax.errors import UserError
from ultramem_jax.interop.olmo_checkpoints import is_olmo_checkpoint, load_olmo, read_olmo_config
from ultramem_jax.interop.reference_torch import write_safetensors
from ultramem_jax.models import Transformer


def encoded(name: str) -> str:
    """Returns the key that OLMo's `safetensors_util` writes for a name."""
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode("ascii")


def write(folder, case: Case, state: dict, **fields) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(run_name="run", model=section(case) | fields, optimizer=dict(betas=[0.9, 0.95]))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_safetensors(folder / "model.safetensors", state)


IDS = np.array([[3, 19, 0, 7, 7]])


def unchanged(state: dict) -> dict:
    return state


def apart(case: Case, change=unchanged, read=unchanged) -> tuple[dict, np.ndarray]:
    """Returns a state and the logits of what is read of it, which hardly depend on rounding.

    No choice of candidates is close, and weights that differ by half a bit give the same logits to 3e-6.
    """
    for seed in range(50):
        state = change(random_state(case, seed))
        logits, gap = forward(case, read(state), IDS[0])
        rng = np.random.default_rng(seed)
        moved = {
            name: array if array.dtype == np.int64 else array * (1 + 2.0**-24 * rng.normal(size=array.shape))
            for name, array in state.items()
        }
        difference = np.abs(forward(case, read(moved), IDS[0])[0] - logits).max()
        if gap > 1e-4 and difference < 3e-6 * logits.std():
            return state, logits
    raise AssertionError("every seed depends on rounding")


def check_logits(folder, expected: np.ndarray, **how):
    """Asserts that the loaded model has the expected logits, and the tree of a fresh model; returns it."""
    config, variables = load_olmo(folder, **how)
    model = Transformer(config)
    own = jax.eval_shape(model.init, jax.random.key(0), IDS)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    chex.assert_trees_all_equal(shapes, {name: own.get(name, {}) for name in variables})
    assert_close_by_size(jax.jit(model.apply)(variables, IDS)[0], expected, str(folder))
    return config, variables


def test_logits_of_ultramem(tmp_path):
    state, expected = apart(CASES["v1"])
    write(tmp_path, CASES["v1"], {encoded(name): array for name, array in state.items()})
    assert is_olmo_checkpoint(str(tmp_path))
    config, variables = check_logits(tmp_path, expected)
    assert (config.vocab_size, config.max_length, config.dropout) == (ROWS, 64, 0.0)
    assert config.attention_qk_norm == "per_head" and config.dtype == "float32"
    assert config.memory.placement == "1:2/3:3" and set(variables["memory"]) == {"memory_0", "memory_1"}


def test_logits_of_ultramem_v2_from_the_files_of_its_ranks(tmp_path):
    state, expected = apart(CASES["v2"])
    write(tmp_path / "whole", CASES["v2"], {f"_fsdp_wrapped_module.{k}": v for k, v in state.items()})
    _, variables = check_logits(tmp_path / "whole", expected)
    for rank in range(2):
        own = dict(state)
        for name in ("values", "pre_values"):
            table = f"transformer.full_memory_layer.{name}_for_look_up"
            own[table] = np.split(state[table], 2, axis=1)[rank]
        write(tmp_path / "ranks", CASES["v2"], {}, vertical_parallel=True, mem_parallel_size=2)
        (tmp_path / "ranks" / "model.safetensors").unlink()
        write_safetensors(tmp_path / "ranks" / f"rank_{rank}" / "model.safetensors", own)
    config, of_ranks = load_olmo(tmp_path / "ranks")
    chex.assert_trees_all_equal(of_ranks, variables)
    assert config.memory.address.query_per_rank and read_olmo_config(tmp_path / "ranks") == config
    (tmp_path / "ranks" / "rank_1" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"rank_1/model.safetensors: no such file"):
        load_olmo(tmp_path / "ranks")


def test_dtypes(tmp_path):
    """Parameters outside memories have the dtype that is asked for, or that of the file."""
    case = CASES["v1"]
    state = random_state(case)
    wide = {k: v if v.dtype == np.int64 else v.astype(np.float64) for k, v in state.items()}
    short = {k: v if v.dtype == np.int64 else v.astype(jnp.bfloat16) for k, v in state.items()}
    for dtype, stored in (("bfloat16", wide), (None, short), ("float32", short), (None, wide)):
        write(tmp_path, case, stored)
        config, variables = load_olmo(tmp_path, dtype)
        assert config.dtype == (dtype or "float32")
        dense = jnp.bfloat16 if dtype == "bfloat16" or (dtype is None and stored is short) else jnp.float32
        rounded = state["transformer.blocks.2.attn_out.weight"].astype(
            jnp.bfloat16 if stored is short else dense
        )
        for name, of_module in variables["params"].items():
            of_memory = name.startswith("memory_")
            assert {leaf.dtype for leaf in jax.tree.leaves(of_module)} == {
                np.dtype(jnp.float32 if of_memory else dense)
            }
        found = variables["params"]["layer_3"]["attention"]["w_out"]
        chex.assert_trees_all_equal(np.asarray(found, np.float32), rounded.astype(np.float32).T)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables["memory"])} == {np.dtype(np.float32)}
        assert variables["buffers"]["memory_0"]["permutation"].dtype == jnp.int32


def test_queries_of_the_release(tmp_path):
    """The released code reads the first 2·d_k rows as one query for both ranks."""

    def released(state):
        return {k: v[: 2 * V2["kdim"]] if "query_proj" in k else v for k, v in state.items()}

    def doubled(state):
        return {k: np.concatenate([v, v[::-1]]) if "query_proj" in k else v for k, v in state.items()}

    case = CASES["v2"]._replace(hyper=V2 | dict(q_for_each_tucker_rank=False))
    state, expected = apart(case, doubled, released)
    write(tmp_path, CASES["v2"], state)
    config, _ = check_logits(tmp_path, expected, released_queries=True)
    assert not config.memory.address.query_per_rank


def test_logits_of_memory_plus(tmp_path):
    state, expected = apart(CASES["memory_plus"])
    write(tmp_path, CASES["memory_plus"], state)
    config, variables = check_logits(tmp_path, expected)
    assert config.attention_qk_norm == "none" and config.memory.placement == "2:2/1:1"
    assert "key_scale" not in variables["params"]["memory_0"]


def test_logits_of_a_mixture_of_experts(tmp_path):
    state, expected = apart(CASES["moe"])
    table = {"transformer.full_memory_layer.values_for_look_up": np.zeros((4, 2))}
    write(tmp_path / "authors", CASES["moe"], state | table)
    config, _ = check_logits(tmp_path / "authors", expected)
    assert config.moe == MoEConfig(
        num_experts=EXPERTS,
        top_k=TOP,
        expert_dim=WIDTH // 2,
        activation="swiglu",
        normalize_gates=False,
        load_balance_weight=0.01,
        router_z_weight=0.0,
        auxiliary_over_layers="mean",
    )


def test_logits_of_olmoe_itself(tmp_path):
    """Its norms of queries and keys are over all heads, and its config has no fields of memories."""
    rng = np.random.default_rng(0)
    widths = {"q_norm": WIDTH, "k_norm": WIDTH // HEADS * KV_HEADS}

    def change(state):
        gains = {
            k: 1 + 0.3 * rng.normal(size=widths[k.split(".")[-2]])
            for k in state
            if k.split(".")[-2] in widths
        }
        return state | {k: v.astype(np.float32) for k, v in gains.items()}

    model = {k: v for k, v in CASES["moe"].model.items() if not k.startswith("mem_")}
    state, expected = apart(Case(model), change)
    write(tmp_path, Case(model), state)
    config, _ = check_logits(tmp_path, expected)
    assert config.attention_qk_norm == "all_heads" and config.memory is None


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    (
        ("v1", dict(alibi=True), "model.alibi = True: must be false"),
        ("v1", dict(rope=1), "model.rope = 1: must be true"),
        ("v1", dict(activation_type="gelu"), "model.activation_type = 'gelu': must be 'swiglu'"),
        ("v1", dict(layer_norm_type="default"), "model.layer_norm_type = 'default': must be 'rms'"),
        ("v1", dict(include_bias=True), "model.include_bias = True: must be false"),
        ("v1", dict(bias_for_layer_norm=True), "model.bias_for_layer_norm = True: must be false"),
        ("v1", dict(clip_qkv=8.0), "model.clip_qkv = 8.0: must be null"),
        ("v1", dict(block_type="llama"), "model.block_type = 'llama': must be one of 'sequential', 'moe'"),
        ("v1", dict(block_group_size=2), "model.block_group_size = 2: must be 1"),
        ("v1", dict(scale_logits=True), "model.scale_logits = True: must be false"),
        ("v1", dict(norm_after=True), "model.norm_after = True: must be false"),
        ("v1", dict(moe_interleave=True), "model.moe_interleave = True: must be false"),
        ("v1", dict(mem_knumber=3), "unknown field in .*config.yaml: model 'mem_knumber': did you mean"),
        ("v1", dict(mem_type="pkm"), "model.mem_type = 'pkm': must be one of 'ultramem_v1'"),
        ("v1", dict(mem_knum=0), "model.mem_knum = 0: must be an integer of at least 1"),
        ("v1", dict(mem_head=3), "model.mem_head = 3: must be at most 2"),
        ("v1", dict(mem_knn=50), r"model.mem_\* amounts to .*top_m = 50"),
        ("v1", dict(mem_insert_way="0:1/1:2"), "'0:1/1:2': span 1: must start after layer 1"),
        ("v1", dict(mem_insert_way="0:1/0:2"), "'0:1/0:2': span 0: must start after layer 1"),
        ("v1", dict(mem_insert_way="2:3"), "'2:3': must be 'full', 'no_mem' or spans .* from 0 to 2"),
        ("v1", dict(mem_insert_way="2:1"), "'2:1': must be 'full'"),
        ("v1", dict(mem_insert_way=125), "model.mem_insert_way = 125: must be 'full'"),
        ("v1", dict(vertical_parallel=True, mem_parallel_size=2), "model.vertical_parallel = True: must be"),
        ("v1", dict(mem_parallel_size=2), "model.mem_parallel_size = 2: vertical_parallel is False"),
        ("v1", dict(n_layers=0), "model.n_layers = 0: must be an integer of at least 1"),
        ("v1", dict(layer_norm_eps="small"), "model.layer_norm_eps = 'small': must be a number"),
        ("v1", dict(weight_tying="yes"), "model.weight_tying = 'yes': must be true or false"),
        ("v1", dict(attention_layer_norm=1), "model.attention_layer_norm = 1: must be true or false"),
        ("v1", dict(mlp_hidden_size=13), "model.mlp_hidden_size = 13: must be even"),
        ("v1", dict(multi_query_attention=False), "model.n_kv_heads = 1: multi_query_attention = False is 2"),
        ("v1", dict(n_heads=5), "config.yaml amounts to model.num_heads = 5"),
        ("v2", dict(mem_value_expand_time=3), "model.mem_value_expand_time = 3: must be 1 or"),
        ("v2", dict(mem_share_ratio=2), "share_ratio = 2.0"),
        ("v2", dict(mem_final_top_expand_time=2), "model.mem_final_top_expand_time = 2: must be 1"),
        (
            "v2",
            dict(vertical_parallel=True, mem_parallel_size=4),
            "model.mem_parallel_size = 4: must be even",
        ),
        ("moe", dict(mem_insert_way="full"), "model.mem_insert_way = 'full': must be 'no_mem' with"),
        ("moe", dict(moe_dropless=False), "model.moe_dropless = False: must be true"),
        ("moe", dict(moe_shared_expert=True), "model.moe_shared_expert = True: must be false"),
        ("moe", dict(moe_top_k=9), "config.yaml amounts to model.moe.top_k = 9"),
    ),
)
def test_fields_that_are_not_computed_are_refused(name, fields, message, tmp_path):
    write(tmp_path, CASES[name], {}, **fields)
    with pytest.raises(UserError, match=message) as error:
        load_olmo(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / "config.yaml") in str(error.value)


@pytest.mark.parametrize("name", ("v2", "moe"))
def test_every_missing_tensor_is_named(name, tmp_path):
    state = random_state(CASES[name])
    for one in list(state)[:: 1 if name == "moe" else 4]:
        write(tmp_path, CASES[name], {k: v for k, v in state.items() if k != one})
        with pytest.raises(UserError) as error:
            load_olmo(tmp_path)
        # Without one name that every model has, keys are not taken for plain names.
        if one != "transformer.wte.weight":
            assert str(error.value) == f"{tmp_path / 'model.safetensors'} has no {one!r}"
        write(tmp_path, CASES[name], state | {one: state[one][..., :-1]})
        with pytest.raises(UserError) as error:
            load_olmo(tmp_path)
        message = f"{one}.shape = {state[one][..., :-1].shape}: must be {state[one].shape}"
        assert str(error.value) == f"{tmp_path / 'model.safetensors'}: {message}"


def test_wrong_tensors_are_named(tmp_path):
    state = random_state(CASES["v2"])
    gain, shuffle = "transformer.ln_f.weight", "transformer.mem_blocks.1.shuffle_index"
    not_finite = state[gain].copy()
    not_finite[3] = np.nan
    twice = state[shuffle].copy()
    twice[0] = twice[1]
    for change, message in (
        ({gain: state[gain].astype(np.int32)}, f"{gain}.dtype = 'I32': must be one of F64, F32, F16, BF16"),
        ({shuffle: state[shuffle] * 1.0}, f"{shuffle}.dtype = 'F64': must be one of I64"),
        ({gain: not_finite}, f"{gain} = .*nan.*must be finite and in float32, 1 of 12 numbers are not"),
        ({gain: np.full(WIDTH, 1e300)}, f"{gain} = .*1e\\+300|inf.*12 of 12 numbers are not"),
        ({shuffle: state[shuffle] + 1}, rf"{shuffle} = \(1, .*its range must be within \[0, "),
        ({shuffle: twice}, f"{shuffle} = '{twice.size - 1} distinct addresses': must be {twice.size}"),
        ({"transformer.wpe.weight": state[gain]}, "has 'transformer.wpe.weight', which the model does not"),
        ({f"extra.{i}": state[gain] for i in range(10)}, "'extra.7' and 2 more, which"),
        ({f"_fsdp_wrapped_module.{gain}": state[gain]}, f"tensor = '{gain}': occurs twice"),
    ):
        write(tmp_path, CASES["v2"], state | change)
        with pytest.raises(UserError, match=message) as error:
            load_olmo(tmp_path)
        assert "\n" not in str(error.value)


class Code:
    """Would run code if its pickle were loaded."""

    def __reduce__(self):
        return (print, ("run",))


def test_keys_that_are_no_names(tmp_path, capsys):
    for key in (
        "name",
        encoded("name")[:-8],
        *(
            base64.urlsafe_b64encode(pickle.dumps(key)).decode("ascii")
            for key in (Code(), (("a", "b"), False), (("a",), True), ((1,), False))
        ),
    ):
        write(tmp_path, CASES["v1"], {key: np.zeros(1)})
        with pytest.raises(UserError, match=r"is not the name of a tensor, plain or in OLMo's encoding"):
            load_olmo(tmp_path)
    assert capsys.readouterr().out == ""


def test_folders_that_cannot_be_loaded(tmp_path):
    assert not is_olmo_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"config.yaml: must be the config of an OLMo checkpoint"):
        load_olmo(tmp_path)
    for text in ("model: [", "model: 3", "- 1", "model: {d_model: 3}", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        assert not is_olmo_checkpoint(tmp_path)
    write(tmp_path, CASES["v1"], {})
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{")
    with pytest.raises(UserError, match=r"model.safetensors: not a whole .safetensors file") as error:
        load_olmo(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").unlink()
    for name, message in (
        (None, r"model.safetensors: no such file$"),
        ("model_and_optim", r"no such file; unshard it with the authors' scripts/unshard.py"),
        ("model.pt", r"model.pt: a pickle, which may run code; convert it where PyTorch is: python -c"),
    ):
        if name:
            (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=message) as error:
            load_olmo(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown dtype 'float16'"):
        load_olmo(tmp_path, dtype="float16")
