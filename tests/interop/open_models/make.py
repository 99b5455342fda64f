"""Makes the folders beside this file: tiny random models of every family, by Hugging Face's own code.

It needs torch and transformers (5.24 made what is committed), which the project and its tests do not:

    python tests/interop/open_models/make.py
"""

import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
SIZES = dict(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=50.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
    original_max_position_embeddings=32,
)


def configs():
    """Returns the config of every family, by the name of its folder."""
    import transformers as t  # here, because collecting tests must not need it

    return {
        "llama": t.LlamaConfig(**SIZES, attention_bias=True, rope_parameters=LLAMA3),
        "mistral": t.MistralConfig(**SIZES, head_dim=6, sliding_window=None),
        "smollm2": t.LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
        "qwen2": t.Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen3": t.Qwen3Config(**SIZES, head_dim=6),
        "olmoe": t.OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False),
        "mixtral": t.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
    }


def main() -> None:
    """Writes config, weights and the logits of a batch, (2, 19, 29) float64, for every family."""
    import torch
    from transformers import AutoModelForCausalLM

    for seed, (name, config) in enumerate(configs().items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at zero and gains at one
                parameter.data += 0.3 * torch.randn_like(parameter)
        sharded = "12KB" if name == "mixtral" else "1GB"
        dtype = torch.bfloat16 if name == "smollm2" else torch.float32
        model = model.to(dtype)
        model.save_pretrained(HERE / name, max_shard_size=sharded)
        ids = torch.randint(0, SIZES["vocab_size"], (2, 19))
        # Read again, because a model that is turned to bfloat16 has its rotary frequencies in it, too.
        model = AutoModelForCausalLM.from_pretrained(
            HERE / name, dtype=torch.float64, experts_implementation="eager"
        )
        with torch.no_grad():
            logits = model(ids).logits
        np.savez_compressed(
            HERE / name / "expected.npz", token_ids=ids.numpy(), logits=logits.numpy().astype(np.float32)
        )
        (HERE / name / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
