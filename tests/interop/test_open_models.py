"""Open models: logits of Hugging Face's own code, bytes that come back, one line for what is refused."""

import json
import os
import pathlib
import re
import shutil
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import assertions
from ultramem_jax import ModelConfig, MoEConfig
from ultramem_jax.config import RopeScalingConfig
from ultramem_jax.data import BpeTokenizer, ByteTokenizer, open_tokenizer
from ultramem_jax.errors import UserError
from ultramem_jax.interop import open_models
from ultramem_jax.interop.safetensors_files import read_safetensors, write_safetensors
from ultramem_jax.models import Transformer
from ultramem_jax.presets import families

HERE = pathlib.Path(__file__).parent / "open_models"
NAMES = sorted(path.name for path in HERE.iterdir() if path.is_dir() and not path.name.startswith("_"))


def tensors_of(folder):
    """All tensors of a folder by name, and the number of its files."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in read_safetensors(file).items()}, len(files)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_bytes_are_those_of_hugging_face(name, tmp_path):
    config, variables = open_models.load(HERE / name)
    expected = np.load(HERE / name / "expected.npz")
    ids = expected["token_ids"].astype(np.int32)
    logits = np.asarray(jax.jit(Transformer(config).apply)(variables, ids))
    chex.assert_trees_all_close(logits, expected["logits"], rtol=0, atol=1e-5 * expected["logits"].std())

    open_models.save(tmp_path / "again", config, variables, shard_bytes=4000 if name == "qwen3" else 10**6)
    (before, _), (after, files) = tensors_of(HERE / name), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and (files > 3) == (name == "qwen3")
    for one, array in before.items():
        assert array.dtype == after[one].dtype and array.tobytes() == after[one].tobytes(), one
    assert open_models.read_config(tmp_path / "again") == config
    assert not [path for path in tmp_path.iterdir() if path.name != "again"]


def test_configs_say_what_the_models_are():
    configs = {name: open_models.read_config(HERE / name) for name in NAMES}
    for config in configs.values():
        assert (config.vocab_size, config.embed_dim, config.mlp_dim, config.num_layers) == (29, 16, 20, 2)
        assert (config.num_heads, config.num_kv_heads, config.max_length) == (4, 2, 64)
    assert configs["llama"].rope_scaling == RopeScalingConfig(4.0, 1.0, 3.0, 32)
    assert configs["llama"].attention_bias == "all" and configs["qwen2"].attention_bias == "qkv"
    assert configs["qwen3"].attention_qk_norm == "per_head" and configs["qwen3"].head_dim == 6
    assert configs["olmoe"].attention_qk_norm == "all_heads"
    assert configs["smollm2"].tie_embeddings and not configs["mistral"].tie_embeddings
    assert configs["mixtral"].rope_theta == 1e6 and configs["mixtral"].norm_eps == 1e-5
    # The loss of Hugging Face counts 3 assignments per token, ours shares: 3 × 0.01.
    moe = configs["olmoe"].moe
    assert (moe.num_experts, moe.top_k, moe.normalize_gates) == (6, 3, False)
    assert moe.load_balance_weight == pytest.approx(0.03) and moe.router_z_weight == 0


def test_dtypes(tmp_path):
    folder = HERE / "smollm2"  # stored in bfloat16
    _, stored = open_models.load(folder)
    config, wide = open_models.load(folder, "float32")
    assert {a.dtype for a in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)} and config.dtype == "float32"
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a.astype(jnp.float32), stored), wide)
    open_models.save(tmp_path / "narrow", config, wide, dtype="bfloat16")
    before, after = tensors_of(folder)[0], tensors_of(tmp_path / "narrow")[0]
    assert all(array.tobytes() == after[name].tobytes() for name, array in before.items())
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    narrow, half = open_models.load(HERE / "llama", "bfloat16")
    assert narrow.dtype == "bfloat16" and {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    with pytest.raises(UserError, match=r"unknown dtype 'float8'.*known are bfloat16, float32"):
        open_models.load(folder, "float8")


MEMORY = dict(num_keys=6, top_m=3, key_dim=4, value_dim=8)
OWN = {
    "two kinds": ModelConfig(
        vocab_size=29,
        embed_dim=16,
        num_layers=3,
        mlp_dim=20,
        memories={
            "ultramem": families.ultramem(placement="1:2/2:3", dtype="bfloat16", **MEMORY),
            "engram": families.engram(
                placement="before@2",
                heads_per_order=2,
                rows_per_head=(31,),
                value_dim=4,
                num_canonical_ids=29,
            ),
        },
    ),
    "shared, in place of a feed-forward": ModelConfig(
        vocab_size=29,
        embed_dim=16,
        num_layers=2,
        mlp_dim=20,
        tie_embeddings=False,
        memories={
            "v2": families.ultramem_v2(
                placement="instead@1/2:2", num_keys=6, top_m=3, key_dim=4, value_dim=8, pre_value_dim=4
            )
        },
    ),
    "experts of another kind": ModelConfig(
        vocab_size=29, embed_dim=16, num_layers=1, moe=MoEConfig(num_experts=3, expert_dim=8)
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_models_of_no_family_come_back(name, tmp_path):
    config = OWN[name]
    rng, tokens = np.random.default_rng(0), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    variables = jax.tree.map(lambda a: rng.integers(0, 9, a.shape).astype(a.dtype), dict(shapes))
    variables = {kind: variables.get(kind, {}) for kind in ("params", "memory", "buffers")}
    open_models.save(tmp_path / "m", config, variables)
    tree = json.loads((tmp_path / "m" / "config.json").read_text())
    assert tree["model_type"] == "ultramem_jax" and tree["ultramem_jax"]["format"] == 1
    again, loaded = open_models.load(tmp_path / "m")
    assert again == config
    chex.assert_trees_all_equal(loaded, variables)
    chex.assert_trees_all_equal_dtypes(loaded, variables)
    names, _ = tensors_of(tmp_path / "m")
    if name == "two kinds":
        assert names["model.memory_tables.ultramem_0.values"].dtype == jnp.bfloat16
        assert {"model.memories.engram_0.key_projection", "model.memory_buffers.engram_0.canonical_ids"} <= (
            names.keys()
        )


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory come from Linux")
def test_no_second_copy_of_a_model_is_held(tmp_path):
    config = ModelConfig(vocab_size=500, embed_dim=512, num_layers=6, mlp="swiglu", mlp_dim=2048)
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    variables: dict | None = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), dict(shapes))
    size = sum(a.nbytes for a in jax.tree.leaves(variables)) / 1e6
    largest = max(a.nbytes for a in jax.tree.leaves(variables)) / 1e6

    def peak_of(call):
        """Megabytes that a call holds at its peak, beyond what was there before."""

        def resident(line):
            return int(re.search(rf"{line}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1e3

        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = resident("VmRSS")
        held = call()
        peak = resident("VmHWM") - before
        del held
        return peak

    assert size > 90 and largest < 5
    # Writing holds a tensor in another layout, reading the model and two tensors; NumPy and the allocator
    # have a few megabytes of their own.
    assert peak_of(lambda: open_models.save(tmp_path / "m", config, variables)) < 2 * largest + 10
    variables = None
    assert peak_of(lambda: open_models.load(tmp_path / "m")) < size + 2 * largest + 10


def changed(tmp_path, name, **fields):
    """A copy of a folder whose config has other fields; None takes one away."""
    folder = tmp_path / "changed"
    shutil.copytree(HERE / name, folder)
    tree = json.loads((folder / "config.json").read_text()) | fields
    tree = {key: value for key, value in tree.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def refused(folder, *said, **options):
    """Checks that a model is refused in one line that says all this."""
    assertions.refused(lambda: open_models.load(folder, **options), *said)


CONFIGS = {
    "a window": ("mistral", dict(sliding_window=8), "sliding_window = 8: must be None"),
    "a window of Llama": ("smollm2", dict(sliding_window=8), "sliding_window = 8"),
    "a window of some layers": (
        "qwen3",
        dict(layer_types=["full_attention", "sliding_attention"]),
        "layer_types = ['full_attention', 'sliding_attention']",
    ),
    "types of one layer of two": (
        "qwen3",
        dict(layer_types=["full_attention"]),
        "layer_types = ['full_attention']: must be 'full_attention' for each of 2 layers",
    ),
    "windows that are used": ("qwen2", dict(use_sliding_window=True, sliding_window=8), "sliding_window = 8"),
    "no word of a window": ("mistral", dict(sliding_window="absent"), "sliding_window = None: must be null"),
    "an activation": ("llama", dict(hidden_act="gelu"), "hidden_act = 'gelu': must be 'silu'"),
    "biases of the MLP": ("llama", dict(mlp_bias=True), "mlp_bias = True: must be False"),
    "biases": ("mistral", dict(attention_bias=True), "attention_bias = True"),
    "clipping": ("olmoe", dict(clip_qkv=8.0), "clip_qkv = 8.0"),
    "another rope": (
        "llama",
        dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "rope_parameters: rope_type = 'yarn': must be 'default' or 'llama3'",
    ),
    "another rope, the older way": (
        "smollm2",
        dict(rope_parameters="absent", rope_scaling={"type": "linear", "factor": 2.0}),
        "rope_scaling: type = 'linear'",
    ),
    "a rope without its factor": (
        "llama",
        dict(rope_parameters={"rope_type": "llama3", "rope_theta": 50.0}),
        "rope_parameters: has no field 'factor'",
    ),
    "two ropes": ("smollm2", dict(rope_theta=5.0), "rope_theta = 10000.0: must be the rope_theta beside it"),
    "a part of the features": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "quantised weights": ("llama", dict(quantization_config={"bits": 4}), "quantization_config"),
    "something new": ("llama", dict(logit_scale=2.0), "logit_scale = 2.0: is not known here"),
    "another family": (
        "llama",
        dict(model_type="gemma3"),
        "unknown",
        "model_type 'gemma3'",
        "mixtral, olmoe",
    ),
    "no family": ("llama", dict(model_type="absent"), "has no field 'model_type'"),
    "no width": ("llama", dict(hidden_size="absent"), "has no field 'hidden_size'"),
    "a width in words": ("llama", dict(hidden_size="wide"), "hidden_size = 'wide': must be of the type int"),
    "heads that do not divide": (
        "llama",
        dict(num_key_value_heads=3),
        "config.json amounts to model.num_kv_heads",
    ),
    "more layers than there are": (
        "llama",
        dict(num_hidden_layers=3),
        "has no 'model.layers.2.input_layernorm.weight'",
        "more",
    ),
    "fewer layers than there are": (
        "llama",
        dict(num_hidden_layers=1),
        "has 'model.layers.1.",
    ),
    "experts without number": (
        "olmoe",
        dict(num_experts=2**30),
        "number of experts = 1073741824",
    ),
    "an output that is not there": (
        "smollm2",
        dict(tie_word_embeddings=False),
        "has no 'lm_head.weight'",
    ),
    "another vocabulary": (
        "llama",
        dict(vocab_size=30),
        "model.embed_tokens.weight.shape = (29, 16): must be (30, 16)",
    ),
    "another width": (
        "mistral",
        dict(intermediate_size=24),
        "weight.shape = (20, 16): must be (24, 16)",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(case, tmp_path):
    name, fields, *said = CONFIGS[case]
    refused(changed(tmp_path, name, **fields), "changed", *said)


def test_what_does_not_change_a_model_is_passed_over(tmp_path):
    notes = dict(
        use_mrope=False,
        use_cache=False,
        torch_dtype="float32",
        _name_or_path="x",
        bos_token_id=7,
        unknown=None,
    )
    folder = changed(tmp_path, "qwen2", **notes, use_sliding_window=False, sliding_window=8, our_note="x")
    refused(folder, "our_note = 'x': is not known here")
    config, _ = open_models.load(folder, ignore=["our_note"])
    assert config == open_models.read_config(HERE / "qwen2")
    older = {"rope_parameters": "absent", "rope_theta": 50.0}
    scaling = json.loads((HERE / "llama" / "config.json").read_text())["rope_parameters"]
    scaling = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    del scaling["rope_theta"]
    folder = changed(tmp_path / "older", "llama", **older, rope_scaling=scaling)
    assert open_models.read_config(folder) == open_models.read_config(HERE / "llama")


def edited(tmp_path, name, edit):
    """A copy of a folder whose only file of tensors `edit` has changed, a dict in and out."""
    folder = tmp_path / "edited"
    shutil.copytree(HERE / name, folder)
    (file,) = folder.glob("*.safetensors")
    state = read_safetensors(file)
    edit(state)
    write_safetensors(file, state)
    return folder


NORM = "model.norm.weight"
TENSORS = {
    "missing": (lambda s: s.pop(NORM), f"has no {NORM!r}"),
    "unknown": (lambda s: s.update(score=s[NORM]), "has 'score', which a model of its config does not have"),
    "misshapen": (lambda s: s.update({NORM: s[NORM][:-1]}), f"{NORM}.shape = (15,): must be (16,)"),
    "integers": (
        lambda s: s.update({NORM: s[NORM].astype(np.int8)}),
        f"{NORM}.dtype = 'int8': must be float32",
    ),
    "an output that is not tied": (
        lambda s: s.update({"lm_head.weight": 2 * s["model.embed_tokens.weight"]}),
        "tie_word_embeddings = True: must be False: lm_head.weight is not the embedding",
    ),
    "doubles": (lambda s: s.update({NORM: s[NORM].astype(np.float64)}), f"{NORM}.dtype = 'float64'"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case, tmp_path):
    edit, said = TENSORS[case]
    refused(edited(tmp_path, "smollm2" if "tied" in case else "llama", edit), said, "edited")


def test_experts_of_two_dtypes(tmp_path):
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    folder = edited(tmp_path, "olmoe", lambda s: s.update({name: s[name].astype(np.float16)}))
    refused(folder, f"{name}.dtype = 'float16': must be that of model.layers.0.mlp.experts.0.up_proj.weight")


def test_tensors_that_say_nothing_new(tmp_path):
    def more(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]

    config, variables = open_models.load(edited(tmp_path, "smollm2", more))
    chex.assert_trees_all_equal((config, variables), open_models.load(HERE / "smollm2"))


def test_broken_files(tmp_path):
    whole = (HERE / "llama" / "model.safetensors").read_bytes()
    folder = changed(tmp_path, "llama")
    for size in (0, 7, 8, 100, 1000, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        refused(folder, "model.safetensors: not a whole .safetensors file")
    (folder / "model.safetensors").unlink()
    refused(folder, "must hold model.safetensors, or model.safetensors.index.json")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: must be JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json: must be a dict")
    (folder / "config.json").unlink()
    refused(folder, "must be a folder with config.json, or a .gguf file")
    refused(tmp_path / "nowhere", "must be a folder or a .gguf file, and there is none")
    refused(HERE / "llama" / "model.safetensors", "must be the folder")


def test_broken_indices(tmp_path):
    folder = changed(tmp_path, "mixtral")
    path = folder / "model.safetensors.index.json"
    whole = json.loads(path.read_text())
    first, *_ = whole["weight_map"]

    def with_map(files):
        path.write_text(json.dumps(whole | {"weight_map": files}))
        return folder

    refused(with_map([]), "weight_map must be a dict of file names by tensor")
    refused(with_map({first: "../x"}), "weight_map = '../x': must name files of this folder")
    refused(with_map({first: "x.safetensors"}), "x.safetensors: must be a regular file")
    refused(with_map({"y": whole["weight_map"][first]}), "weight_map['y']", "must hold that tensor")
    rest = {name: file for name, file in whole["weight_map"].items() if name != first}
    refused(with_map(rest), "weight_map lacks", first)
    file = folder / whole["weight_map"][first]
    file.write_bytes(file.read_bytes()[:-1])
    refused(with_map(whole["weight_map"]), file.name, "not a whole .safetensors file")


@pytest.mark.parametrize("ids", [29, 23])
def test_maps_of_memories_stay_in_range(ids, tmp_path):
    config = OWN["two kinds"]
    engram = config.memories["engram"].changed(num_canonical_ids=ids)
    config = replace(config, memories=config.memories | {"engram": engram})
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), dict(shapes))
    wrong = variables["buffers"]["engram_0"] | {"canonical_ids": jnp.full((29,), ids, jnp.int32)}
    variables["buffers"] = variables["buffers"] | {"engram_0": wrong}
    open_models.save(tmp_path / "m", config, variables)
    refused(
        tmp_path / "m",
        f"model.memory_buffers.engram_0.canonical_ids = ({ids}, {ids}): its range must be within [0, {ids})",
    )


def test_tokenizers_are_named(tmp_path):
    config = ModelConfig(vocab_size=280, embed_dim=16, num_layers=1, mlp_dim=20)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), dict(shapes))
    assert open_models.tokenizer_of(HERE / "llama") is None
    open_models.save(tmp_path / "bytes", config, variables, tokenizer=ByteTokenizer())
    assert open_models.tokenizer_of(tmp_path / "bytes") == "bytes"
    bpe = BpeTokenizer.train([b"the cat sat on the mat " * 20], 270)
    open_models.save(tmp_path / "bpe", config, variables, tokenizer=bpe)
    assert open_models.tokenizer_of(tmp_path / "bpe") == str(tmp_path / "bpe")
    assert open_tokenizer(tmp_path / "bpe").encode(b"the cat").tolist() == bpe.encode(b"the cat").tolist()
    settings = json.loads((tmp_path / "bpe" / "tokenizer_config.json").read_text())
    # Or transformers would choose a class by the type of the model, with a pre-tokenizer of its own.
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    assert open_models.read_config(tmp_path / "bpe") == config


def test_nothing_is_overwritten_or_half_written(tmp_path):
    config, variables = open_models.load(HERE / "llama")
    there = tmp_path / "there"
    shutil.copytree(HERE / "llama", there)
    with pytest.raises(UserError, match=r"folder = .*there'?: must be new or empty"):
        open_models.save(there, config, variables)
    lacking = variables | {"params": {**variables["params"], "layer_1": {}}}
    with pytest.raises(UserError, match=r"variables has no 'params/layer_1/attention_norm/scale'"):
        open_models.save(tmp_path / "new", config, lacking)
    more = variables | {"params": {**variables["params"], "lora": {"a": jnp.ones(2)}}}
    with pytest.raises(UserError, match=r"variables has 'params/lora/a', which the config's model does not"):
        open_models.save(tmp_path / "new", config, more)
    wide = variables | {"params": {**variables["params"], "embedding": jnp.ones((30, 16))}}
    with pytest.raises(UserError, match=r"params/embedding.shape = \(30, 16\): must be \(29, 16\)"):
        open_models.save(tmp_path / "new", config, wide)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_models.save(tmp_path / "file" / "new", config, variables)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}
