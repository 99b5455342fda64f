"""Makes small models in GGUF files, under the package's names for Hugging Face's tensors."""

import itertools
import json

import gguf
import numpy as np
import tokenizers

from tests.data.trained_tokenizers import BOS, EOS, byte_level
from ultramem_jax.data.pre_tokenizers import PRE_TOKENIZERS

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH, INNER, EXPERTS, WORDS, LAYERS = 32, 4, 2, 16, 64, 3, 40, 2
ARCHITECTURES = {name: name for name in ("llama", "qwen2", "qwen3", "olmoe")} | {"mixtral": "llama"}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmoe": "Olmoe", "mixtral": "Mixtral"}
HEAD_WIDTHS = dict.fromkeys(ARCHITECTURES, HEAD_WIDTH) | {"olmoe": WIDTH // HEADS}
THETA = 500_000.0


def state_of(model_type, tied=False, attention_bias=False, mlp_bias=False, words=WORDS):
    """Random tensors of a model under Hugging Face's names."""
    shapes = {"model.embed_tokens.weight": (words, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (words, WIDTH)
    head_width = HEAD_WIDTHS[model_type]
    rows = {"q": HEADS * head_width, "k": KEY_HEADS * head_width, "v": KEY_HEADS * head_width}
    maps = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    for layer in (f"model.layers.{n}" for n in range(LAYERS)):
        shapes |= {f"{layer}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (n, WIDTH) for x, n in rows.items()}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, rows["q"])
        if attention_bias or model_type == "qwen2":
            shapes |= {f"{layer}.self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
        if attention_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (WIDTH,)
        if model_type in ("qwen3", "olmoe"):
            normed = {"q": head_width, "k": head_width} if model_type == "qwen3" else rows
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (normed[x],) for x in "qk"}
        if model_type == "mixtral":
            moe = f"{layer}.block_sparse_moe"
            shapes[f"{moe}.gate.weight"] = (EXPERTS, WIDTH)
            for n, (kind, w) in itertools.product(range(EXPERTS), {"gate": 1, "down": 2, "up": 3}.items()):
                shapes[f"{moe}.experts.{n}.w{w}.weight"] = maps[kind]
        elif model_type == "olmoe":
            shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, WIDTH)
            for n, kind in itertools.product(range(EXPERTS), maps):
                shapes[f"{layer}.mlp.experts.{n}.{kind}_proj.weight"] = maps[kind]
        else:
            shapes |= {f"{layer}.mlp.{kind}_proj.weight": shape for kind, shape in maps.items()}
        if mlp_bias:
            shapes |= {f"{layer}.mlp.{kind}_proj.bias": shape[:1] for kind, shape in maps.items()}
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def interleaved(rows, heads):
    """The rows of a map as llama.cpp stores them: two that are rotated together are neighbours."""
    stored = np.empty_like(rows)
    width = len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            stored[head * width + 2 * i] = rows[head * width + i]
            stored[head * width + 2 * i + 1] = rows[head * width + width // 2 + i]
    return stored


def tensors_of(model_type, state, stacked=True):
    """The tensors of a file: names are those of the package, but in old files for single experts."""
    architecture = ARCHITECTURES[model_type]
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, LAYERS)
    tensors = {}
    for name, array in state.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleaved(array, HEADS if "q_proj" in name else KEY_HEADS)
        head, _, rest = name.partition(".experts.")
        if not rest:
            tensors[names.get_name(name, (".weight", ".bias"))] = array
            continue
        expert, _, kind = rest.partition(".")
        layer = head.split(".")[2]
        merged = f"{head}.experts.{kind}" if "mlp" in head else f"layers.{layer}.feed_forward.experts.{kind}"
        stack = names.get_name(merged, (".weight",))
        if stacked:
            tensors.setdefault(stack, []).append(array)
        else:
            tensors[stack.replace("_exps", f".{expert}")] = array
    return {name: np.stack(t) if isinstance(t, list) else t for name, t in tensors.items()}


def fields_of(model_type):
    """The metadata of a file, without the prefix of the architecture."""
    fields = {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "attention.key_length": HEAD_WIDTHS[model_type],
        "attention.value_length": HEAD_WIDTHS[model_type],
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": THETA,
        "rope.dimension_count": HEAD_WIDTHS[model_type],
        "vocab_size": WORDS,
    }
    if model_type in ("mixtral", "olmoe"):
        fields |= {"expert_count": EXPERTS, "expert_used_count": 2}
    return fields


def finished(file, path, tensors):
    """Writes the file with tensors, which are arrays or (bytes, type), and returns the path."""
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        file.add_tensor(name, data, raw_dtype=kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def write(path, tensors, fields, architecture="llama", other=()):
    file = gguf.GGUFWriter(path, architecture)
    for key, value in [*((f"{architecture}.{k}", v) for k, v in fields.items()), *dict(other).items()]:
        add = {bool: file.add_bool, int: file.add_uint32, float: file.add_float32, str: file.add_string}
        add.get(type(value), file.add_array)(key, value)
    return finished(file, path, tensors)


KEYS = "tokenizer.ggml."


def tokenizer_fields(backend: tokenizers.Tokenizer, name: str) -> dict:
    """Returns the fields that a converter writes of byte-level BPE."""
    tree = json.loads(backend.to_str())
    added = {token["id"]: token["special"] for token in tree["added_tokens"]}
    size = backend.get_vocab_size()
    return {
        KEYS + "model": "gpt2",
        KEYS + "pre": name,
        # As if the embedding table had two rows more.
        KEYS + "tokens": [backend.id_to_token(i) for i in range(size)] + [f"[PAD{size + i}]" for i in (0, 1)],
        KEYS + "token_type": [{True: 3, False: 4}.get(added.get(i), 1) for i in range(size)] + [5, 5],
        KEYS + "merges": [" ".join(pair) for pair in tree["model"]["merges"]],
        KEYS + "eos_token_id": backend.token_to_id(EOS),
        KEYS + "bos_token_id": backend.token_to_id(BOS),
    }


def write_small_smollm2(path):
    """Writes a small model of SmolLM2's kind with its own tokenizer, which knows every byte."""
    words = tokenizer_fields(byte_level(PRE_TOKENIZERS["smollm"]), "smollm")
    state = state_of("llama", tied=True, words=len(words[KEYS + "tokens"]))
    state = {name: array if array.ndim < 2 else array / 8 for name, array in state.items()}
    fields = fields_of("llama") | {"vocab_size": len(words[KEYS + "tokens"]), "context_length": 256}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, tensors_of("llama", state), fields, other=words)
