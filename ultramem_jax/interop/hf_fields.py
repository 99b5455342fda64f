"""Reads the fields of a Hugging Face `config.json`, so that none that changes the model is overlooked."""

from collections.abc import Collection
from typing import Any

from ultramem_jax.errors import UserError, require
from ultramem_jax.tree_types import JsonDict

BYTES = "ultramem_jax_bytes"
"""Field of a saved config that says that the tokens are bytes, which need no tokenizer's file."""
_NO_MATTER = frozenset(
    [
        # What wrote the file, and how its classes are called.
        *("architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config"),
        "model_type",
        # Where text begins and ends: the tokenizer's files say so, too.
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "tokenizer_class"),
        # Training.
        *("attention_dropout", "initializer_range", "router_jitter_noise", "output_router_logits"),
        # How it is computed.
        *("use_cache", "pretraining_tp", "attn_implementation", "torchscript", "use_bfloat16"),
        # What a call returns.
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
        # Other tasks than the next token.
        *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        # Layers with a window, which `use_sliding_window` and `layer_types` rule out.
        "max_window_layers",
        # Notes of converters.
        *("is_llama_config", "unsloth_version", "unsloth_fixed", "max_sequence_length"),
        # Of this project, read elsewhere.
        BYTES,
    ]
)
"""Fields that do not change what a model computes."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
}
"""Fields with the values that this project computes."""

_REQUIRED = object()


class Fields:
    """Gives the fields of a config by name and type, and knows which ones nobody has asked for."""

    def __init__(self, tree: JsonDict, where: str):
        """Reads `tree`, which must be a dict; `where` names it in messages."""
        if not isinstance(tree, dict):
            raise UserError(f"{where}: must be a dict of fields, not a {type(tree).__name__}")
        self.where = where
        self._tree, self._seen = tree, set[str]()

    def __contains__(self, name: str) -> bool:
        return self._tree.get(name) is not None

    def has(self, name: str) -> bool:
        """Tells whether a field is there, also if it is null."""
        return name in self._tree

    def of(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns a field of a type; null and a field that is missing are the default.

        Raises:
            UserError: it is missing and has no default, or is of another type.
        """
        self._seen.add(name)
        value = self._tree.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where}: has no field {name!r}, which the model needs")
            return default
        accepted = (int, float) if kind is float else kind
        right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        self.require(right, name, f"must be of the type {kind.__name__}")
        return value

    def inner(self, name: str) -> "Fields":
        """Returns the fields of a field that is a dict; its messages name both."""
        return Fields(self.of(name, dict), f"{self.where}: {name}")

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """Raises the error of a field unless the condition holds."""
        require(condition, f"{self.where}: {name}", self._tree.get(name), allowed)

    def only(self, name: str, *values: Any) -> None:
        """Refuses a field with another value than these; one that is missing or null is none of them."""
        self._seen.add(name)
        value = self._tree.get(name)
        allowed = f"must be {' or '.join(map(repr, values))}: nothing else is computed here"
        self.require(value is None or value in values, name, allowed)

    def refuse_others(self, ignore: Collection[str] = ()) -> None:
        """Refuses fields that are unknown and not null: they may change what the model computes.

        Args:
            ignore: further fields that do not.
        """
        for name, values in _ONLY.items():
            self.only(name, *values)
        if "layer_types" in self:
            kinds = self.of("layer_types", list)
            layers = self.of("num_hidden_layers", int, len(kinds))
            allowed = f"must be 'full_attention' for each of {layers} layers"
            self.require(kinds == ["full_attention"] * layers, "layer_types", allowed)
        allowed = "is not known here, and may change the computation; `ignore` of load passes it over"
        for name, value in self._tree.items():
            known = name in self._seen or name in _NO_MATTER or name.startswith("_") or name in ignore
            require(known or value is None, f"{self.where}: {name}", value, allowed)
