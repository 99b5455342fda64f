"""Models in GGUF files, written under the package's names for Hugging Face's tensors, come back whole."""

import itertools
import math
import os

import gguf
import numpy as np
import pytest

from tests.support.assertions import refused
from tests.support.gguf_models import (
    ARCHITECTURES,
    CLASSES,
    EXPERTS,
    HEAD_WIDTH,
    HEAD_WIDTHS,
    HEADS,
    INNER,
    KEY_HEADS,
    LAYERS,
    THETA,
    WIDTH,
    WORDS,
    fields_of,
    state_of,
    tensors_of,
    write,
)
from ultramem_jax.errors import UserError
from ultramem_jax.interop.gguf_models import open_gguf_model

CONFIG = {
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_WIDTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": THETA,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {},
    "qwen3": {"attention_bias": False},
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": False},
}
OWN["olmoe"]["head_dim"] = HEAD_WIDTHS["olmoe"]
TOKENS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
CASES = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tied": True}),
    "llama_with_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tied": True}),
    "qwen3_with_biases": ("qwen3", {"attention_bias": True}),
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_models_come_back(tmp_path, case):
    model_type, options = CASES[case]
    state, architecture = state_of(model_type, **options), ARCHITECTURES[model_type]
    path = write(
        tmp_path / "m.gguf", tensors_of(model_type, state), fields_of(model_type), architecture, TOKENS
    )
    config, tensors = open_gguf_model(path)
    of_type = {"model_type": model_type, "architectures": [f"{CLASSES[model_type]}ForCausalLM"]}
    biases = {name: value for name, value in options.items() if name.endswith("bias")}
    tied = {"tie_word_embeddings": options.get("tied", False)}
    assert config == CONFIG | of_type | OWN[model_type] | tied | biases
    assert tensors.where == str(path)
    assert tensors.shapes == {name: array.shape for name, array in state.items()}
    for name, array in state.items():
        assert tensors.dtype(name) == "float32"
        np.testing.assert_array_equal(tensors.read(name), array)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_experts_of_old_files_are_single_tensors(tmp_path, model_type):
    state = state_of(model_type)
    stored = tensors_of(model_type, state, stacked=False)
    assert "blk.1.ffn_up.2.weight" in stored
    path = write(tmp_path / "m.gguf", stored, fields_of(model_type), ARCHITECTURES[model_type])
    _, tensors = open_gguf_model(path)
    assert tensors.shapes == {name: array.shape for name, array in state.items()}
    for name, array in state.items():
        np.testing.assert_array_equal(tensors.read(name), array)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_stored_types_are_named_and_read(tmp_path, model_type, kind):
    number = gguf.GGMLQuantizationType[kind]
    state = state_of(model_type)
    stored = tensors_of(model_type, state)
    coarse = {name: gguf.quants.quantize(array, number) for name, array in stored.items() if array.ndim > 1}
    written = stored | {name: (array.view(np.uint8), number) for name, array in coarse.items()}
    path = write(tmp_path / "m.gguf", written, fields_of(model_type))
    _, tensors = open_gguf_model(path)
    named = {"F16": "float16", "BF16": "bfloat16"}.get(kind, kind)
    # Blocks lie within rows, so that rows may be permuted before or after they are quantized.
    for name, array in state.items():
        expected = gguf.dequantize(gguf.quants.quantize(array, number), number) if array.ndim > 1 else array
        read = tensors.read(name)
        assert tensors.dtype(name) == (named if array.ndim > 1 else "float32")
        assert read.dtype.name == (tensors.dtype(name) if kind in ("F16", "BF16") else "float32")
        np.testing.assert_array_equal(read.astype(np.float32), expected)


def test_what_a_file_need_not_say(tmp_path):
    width = WIDTH // HEADS  # keys and values of a head, as no width is given
    fields = fields_of("llama")
    for key in ("key_length", "value_length", "head_count_kv"):
        del fields[f"attention.{key}"]
    del fields["rope.freq_base"], fields["rope.dimension_count"], fields["vocab_size"]
    stored = tensors_of("llama", state_of("llama"))
    for layer, name in itertools.product(range(LAYERS), "qkv"):
        stored[f"blk.{layer}.attn_{name}.weight"] = np.zeros((HEADS * width, WIDTH), np.float32)
    for layer in range(LAYERS):
        stored[f"blk.{layer}.attn_output.weight"] = np.zeros((WIDTH, HEADS * width), np.float32)
    config, _ = open_gguf_model(write(tmp_path / "m.gguf", stored, fields))
    expected = {"head_dim": width, "num_key_value_heads": HEADS, "rope_theta": 10_000.0, "vocab_size": WORDS}
    assert expected.items() <= config.items()
    assert "bos_token_id" not in config and "eos_token_id" not in config


NOTHING_NEW = {
    "attention.head_count": [HEADS] * LAYERS,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "feed_forward_length": [INNER] * LAYERS,
    "logit_scale": 1.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.finetuned": False,
    "tensor_data_layout": "Meta AI original pth",
    "attention.causal": True,
    "expert_feed_forward_length": INNER,
}


def test_metadata_that_change_nothing(tmp_path):
    other = {
        "general.type": "model",
        "general.author.unknown_key": "me",
        "split.count": 1,
        "quantize.imatrix.chunks_count": 3,
        "tokenizer.chat_template": "{}",
        "somebody.convert_type": "hf",
    }
    path = write(
        tmp_path / "m.gguf",
        tensors_of("llama", state_of("llama")),
        fields_of("llama") | NOTHING_NEW,
        other=other | TOKENS,
    )
    config, _ = open_gguf_model(path)
    assert CONFIG.items() <= config.items() and config["model_type"] == "llama"


def llama3_divisors(factor, low=1.0, high=4.0, context=8192, width=HEAD_WIDTH):
    """Returns the divisors of the rotary frequencies in Llama 3.1."""
    divisors = []
    for i in range(width // 2):
        wavelength = 2 * math.pi * THETA ** (2 * i / width)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_llama3_scaling_is_recovered(tmp_path, model_type, factor):
    divisors = llama3_divisors(factor)
    assert len(set(divisors)) > 2  # some frequencies are between those that stay and those that are divided
    stored = tensors_of(model_type, state_of(model_type)) | {"rope_freqs.weight": divisors}
    config, tensors = open_gguf_model(write(tmp_path / "m.gguf", stored, fields_of(model_type)))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert tensors.shapes.keys() == state_of(model_type).keys()


def test_divisors_of_one_scale_nothing(tmp_path):
    stored = tensors_of("llama", state_of("llama")) | {"rope_freqs.weight": np.ones(8, np.float32)}
    config, _ = open_gguf_model(write(tmp_path / "m.gguf", stored, fields_of("llama")))
    assert config["rope_scaling"] is None


def changed(divisors, at, value):
    return np.where(np.arange(len(divisors)) == at, np.float32(value), divisors)


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(8.0, context=4096),
        llama3_divisors(8.0, high=2.0),
        changed(llama3_divisors(8.0), 0, 1.00002),
        changed(llama3_divisors(8.0), 3, np.nan),
        changed(llama3_divisors(8.0), 7, np.inf),
        np.zeros(8, np.float32),
        -llama3_divisors(8.0),
        np.full(8, 0.5, np.float32),
    ],
)
def test_other_divisors_are_refused(tmp_path, divisors):
    stored = tensors_of("llama", state_of("llama")) | {"rope_freqs.weight": divisors}
    path = write(tmp_path / "m.gguf", stored, fields_of("llama"))
    refused(lambda: open_gguf_model(path), f"{path}: rope_freqs.weight = [", "must be Llama 3.1's divisors")


REFUSED = {
    "llama.block_count = 0: must be a whole number of at least 1": {"block_count": 0},
    "llama.block_count = 4000000000: the file has only 21 tensors": {"block_count": 4_000_000_000},
    "llama.block_count = 2.0: must be a whole number": {"block_count": 2.0},
    "llama.context_length = True: must be a whole number": {"context_length": True},
    "llama.attention.head_count = [4, 2]: must be the same for all layers": {"attention.head_count": [4, 2]},
    "llama.attention.head_count_kv = [1, 2]: must be": {"attention.head_count_kv": [1, 2]},
    "llama.attention.head_count_kv = 3: must divide attention.head_count = 4": {"attention.head_count_kv": 3},
    "llama.feed_forward_length = [64, 32]: must be": {"feed_forward_length": [64, 32]},
    "llama.attention.value_length = 8: must be 16, the width": {"attention.value_length": 8},
    "llama.rope.dimension_count = 8: must be 16, the width": {"rope.dimension_count": 8},
    "llama.attention.layer_norm_rms_epsilon = 0.0": {"attention.layer_norm_rms_epsilon": 0.0},
    "llama.rope.freq_base = inf": {"rope.freq_base": math.inf},
    "llama.rope.freq_base = 'x'": {"rope.freq_base": "x"},
    "llama.rope.scaling.type = 'yarn': must be 'none'": {"rope.scaling.type": "yarn"},
    "llama.rope.scaling.type = 'linear': must be 'none'": {"rope.scaling.type": "linear"},
    "llama.rope.scaling.factor = 4.0: must be 0 or 1": {"rope.scaling.factor": 4.0},
    "llama.rope.scale_linear = 2.0: must be 0 or 1": {"rope.scale_linear": 2.0},
    "llama.attention.sliding_window = 4096: must be 0": {"attention.sliding_window": 4096},
    "llama.attention.clamp_kqv = 8.0: must be 0": {"attention.clamp_kqv": 8.0},
    "llama.attention.causal = False: must be True": {"attention.causal": False},
    "llama.logit_scale = 0.5: must be 0 or 1": {"logit_scale": 0.5},
    "llama.final_logit_softcapping = 30.0: must be 0": {"final_logit_softcapping": 30.0},
    "llama.attn_logit_softcapping = 50.0: must be 0": {"attn_logit_softcapping": 50.0},
    "llama.expert_used_count = 2: must be in [0, 0]": {"expert_used_count": 2},
    "llama.expert_shared_count = 1: must be 0": {"expert_shared_count": 1},
    "llama.pooling_type = 3: must be 0": {"pooling_type": 3},
    "llama.a_new_key = 1: must not be there": {"a_new_key": 1},
    "llama.a_new_list = [0, 1, 2, 3, 4, 5, 6, 7]: must not": {"a_new_list": list(range(100))},
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_computations_are_refused(tmp_path, message):
    fields = fields_of("llama") | REFUSED[message]
    path = write(tmp_path / "m.gguf", tensors_of("llama", state_of("llama")), fields)
    refused(lambda: open_gguf_model(path), f"{path}: {message}")


WITH_EXPERTS = {
    ("mixtral", "llama.expert_used_count = 4: must be in [1, 3]"): {"expert_used_count": 4},
    ("mixtral", "llama.expert_used_count = 0: must be in [1, 3]"): {"expert_used_count": 0},
    ("mixtral", "llama.expert_weights_scale = 2.5: must be 1"): {"expert_weights_scale": 2.5},
    ("mixtral", "llama.expert_gating_func = 2: must be 0 or 1"): {"expert_gating_func": 2},
    ("mixtral", "llama.expert_weights_norm = False: must be True"): {"expert_weights_norm": False},
    ("mixtral", "blk.0.ffn_gate_inp.weight.shape = (3, 32): must be (8, 32)"): {"expert_count": 8},
    ("olmoe", "olmoe.expert_weights_norm = True: must be False"): {"expert_weights_norm": True},
    ("olmoe", "olmoe.expert_feed_forward_length = 8: must be 0 or 64"): {"expert_feed_forward_length": 8},
    ("olmoe", "olmoe.expert_count = 0: must be at least 1"): {"expert_count": 0},
    ("olmoe", "olmoe.attention.key_length = 16: must be 32 / 4"): {
        key: 16 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    },
    ("qwen2", "qwen2.expert_count = 3: must be 0"): {"expert_count": 3},
    ("qwen3", "qwen3.rope.dimension_sections = [4, 4, 0, 0]: must"): {
        "rope.dimension_sections": [4, 4, 0, 0]
    },
}


@pytest.mark.parametrize(("model_type", "message"), WITH_EXPERTS)
def test_other_computations_of_other_models_are_refused(tmp_path, model_type, message):
    fields = fields_of(model_type) | WITH_EXPERTS[model_type, message]
    architecture = ARCHITECTURES[model_type]
    path = write(tmp_path / "m.gguf", tensors_of(model_type, state_of(model_type)), fields, architecture)
    refused(lambda: open_gguf_model(path), f"{path}: {message}")


def test_other_files_are_refused(tmp_path):
    stored, fields = tensors_of("llama", state_of("llama")), fields_of("llama")
    path = tmp_path / "m.gguf"
    for architecture, hint in (("gemma2", ""), ("qwen3moe", "did you mean 'qwen3'? ")):
        write(path, stored, fields, architecture)
        said = f"unknown general.architecture '{architecture}': {hint}known are llama, olmoe, qwen2, qwen3"
        refused(lambda: open_gguf_model(path), f"{path}: {said}")
    write(path, stored, fields, other={"split.count": 3})
    refused(lambda: open_gguf_model(path), "m.gguf: split.count = 3: must be 1: merge the files")
    write(path, stored, fields, other={"general.type": "adapter"})
    refused(lambda: open_gguf_model(path), "m.gguf: general.type = 'adapter': must be 'model'")
    for key in ("block_count", "context_length", "attention.layer_norm_rms_epsilon"):
        write(path, stored, {name: value for name, value in fields.items() if name != key})
        refused(lambda: open_gguf_model(path), f"m.gguf: has no llama.{key}")


EXTRA = {
    ("llama", "blk.0.attn_q_norm.weight"): (HEAD_WIDTH,),
    ("llama", "blk.0.attn_q.scale"): (1,),
    ("llama", "blk.2.attn_norm.weight"): (WIDTH,),
    ("llama", "rope_factors_long.weight"): (8,),
    ("llama", "output.bias"): (WORDS,),
    ("qwen2", "blk.1.attn_output.bias"): (WIDTH,),
    ("qwen3", "rope_freqs.weight"): (8,),
    ("qwen3", "cls.output.weight"): (2, WIDTH),
    ("mixtral", "blk.0.attn_q.bias"): (HEADS * HEAD_WIDTH,),
    ("olmoe", "blk.0.ffn_gate_shexp.weight"): (INNER, WIDTH),
}


@pytest.mark.parametrize(("model_type", "name"), EXTRA)
def test_tensors_that_are_left_over_are_named(tmp_path, model_type, name):
    stored = tensors_of(model_type, state_of(model_type))
    stored[name] = np.ones(EXTRA[model_type, name], np.float32)
    path = write(tmp_path / "m.gguf", stored, fields_of(model_type), ARCHITECTURES[model_type])
    said = f"{path}: has a tensor {name}, which {model_type} models do not have"
    refused(lambda: open_gguf_model(path), said)


@pytest.mark.parametrize("case", ["llama_with_biases", "qwen2", "qwen3", "olmoe"])
def test_tensors_that_are_missing_or_of_another_shape_are_named(tmp_path, case):
    model_type, options = CASES[case]
    stored = tensors_of(model_type, state_of(model_type, **options))
    path, fields, architecture = tmp_path / "m.gguf", fields_of(model_type), ARCHITECTURES[model_type]
    for name in [name for name in stored if not name.startswith(("blk.0", "output.weight"))]:
        write(path, {key: array for key, array in stored.items() if key != name}, fields, architecture)
        refused(lambda: open_gguf_model(path), "m.gguf: has no tensor ", name)
        shape = stored[name].shape
        if name != "token_embd.weight":  # which says how large the vocabulary is
            write(
                path,
                stored | {name: np.zeros((*shape[:-1], shape[-1] + 1), np.float32)},
                fields,
                architecture,
            )
            refused(lambda: open_gguf_model(path), f"m.gguf: {name}.shape = (", f"must be {shape}")


def test_weights_are_floats(tmp_path):
    stored = tensors_of("mixtral", state_of("mixtral"))
    path = tmp_path / "m.gguf"
    for name in ("blk.1.ffn_up_exps.weight", "output_norm.weight"):
        write(path, stored | {name: stored[name].astype(np.int32)}, fields_of("mixtral"))
        refused(lambda: open_gguf_model(path), f"m.gguf: {name}.dtype = 'I32': must be floats")


def test_flipped_bytes_of_the_head_give_a_model_or_one_line(tmp_path):
    stored = tensors_of("llama", state_of("llama")) | {"rope_freqs.weight": llama3_divisors(8.0)}
    data = write(tmp_path / "whole.gguf", stored, fields_of("llama"), other=TOKENS).read_bytes()
    head = len(data) - sum(array.nbytes for array in stored.values())
    path = tmp_path / "flipped.gguf"
    path.write_bytes(data)
    generator = np.random.default_rng(0)
    refusals = 0
    with open(path, "r+b") as file:
        for at in range(0, head, 4):
            flipped = data[at] ^ int(generator.choice([0x80, 0xFF, 1 << generator.integers(8)]))
            os.pwrite(file.fileno(), bytes([flipped]), at)
            try:
                config, tensors = open_gguf_model(path)
                assert config["hidden_size"] == WIDTH and tensors.read("model.norm.weight").shape == (WIDTH,)
            except UserError as error:
                refusals += 1
                assert str(path) in str(error) and "\n" not in str(error)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert refusals > 100
    open_gguf_model(path)
