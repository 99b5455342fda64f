"""Loads the model of a command: the checkpoint of a run, or an open model with its tokenizer."""

import pathlib

from absl import flags

from ultramem_jax.commands.model_and_tokenizer import GivenModel
from ultramem_jax.data import ByteTokenizer, Tokenizer, open_tokenizer
from ultramem_jax.data.tokenizers import require_vocabulary
from ultramem_jax.errors import UserError, require
from ultramem_jax.interop import open_models
from ultramem_jax.training.restore import load_model

_LONGEST = 1024
"""Context of an open model in tokens, unless a flag says otherwise: more takes memory that grows with it."""

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "`last`, `best` (validation loss), or a step")
MODEL = flags.DEFINE_string(
    "model", "", "an open model in place of a run: a folder of Hugging Face, or a .gguf file"
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "dtype of the computation of --model; by default float32"
)


def given_model() -> GivenModel:
    """Returns the model that the flags name.

    Raises:
        UserError: see `load_model` and `open_models.load`; an open model has no tokenizer, or one that does
            not fit it; a flag is given that is only for the other kind.
    """
    if not MODEL.value:
        if DTYPE.value is not None:
            raise UserError(f"--dtype = {DTYPE.value!r}: needs --model; a run has model.dtype")
        loaded = load_model(WORKDIR.value, CHECKPOINT.value)
        title = f"step {loaded.step} of {WORKDIR.value}"
        length = loaded.config.data.seq_len
        return GivenModel(loaded.config.model, loaded.variables, loaded.tokenizer, length, title, loaded)
    for flag in (WORKDIR, CHECKPOINT):
        if flag.present:
            raise UserError(f"--{flag.name} = {flag.value!r}: must not be given with --model")
    tokenizer: Tokenizer = ByteTokenizer()
    if not pathlib.Path(MODEL.value).is_dir() or open_models.tokenizer_of(MODEL.value) != "bytes":
        tokenizer = open_tokenizer(MODEL.value)
    config = open_models.read_config(MODEL.value)
    require_vocabulary(tokenizer, config.vocab_size, f"the tokenizer of --model = {MODEL.value!r}")
    config, variables = open_models.load(MODEL.value, DTYPE.value)
    length = min(config.max_length or _LONGEST, _LONGEST)
    return GivenModel(config, variables, tokenizer, length, MODEL.value, None)


def given_model_with_memory() -> GivenModel:
    """Returns `given_model()`, which must have a memory.

    Raises:
        UserError: it has none; see also `given_model`.
    """
    given = given_model()
    flag, value = ("--model", MODEL.value) if MODEL.value else ("--workdir", WORKDIR.value)
    require(bool(given.config.memories), flag, value, "must be a model with a memory")
    return given
