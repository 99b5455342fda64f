"""Writes a run's model as a folder in Hugging Face's form, with its tokenizer.

A model that a family of Hugging Face computes is written as that family, which other programs read. Others,
such as models with memories, are written under names of this project, which `--model` and `--init_from` read.
LoRA's factors are merged into the matrices that they adapt.

    ultramem export --workdir=runs/demo --folder=exported
"""

from absl import flags

from ultramem_jax.data import ByteTokenizer
from ultramem_jax.interop import hf_config, open_models
from ultramem_jax.training.restore import load_model

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "folder of the run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "`last`, `best` (validation loss), or a step")
FOLDER = flags.DEFINE_string("folder", None, "folder to write, which must be new or empty", required=True)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "float16", "bfloat16"],
    "dtype of the tensors, except those of memories; by default as they are",
)


def main() -> None:
    """Writes the folder, and says what it is."""
    loaded = load_model(WORKDIR.value, CHECKPOINT.value)
    config = loaded.config.model
    open_models.save(FOLDER.value, config, loaded.variables, tokenizer=loaded.tokenizer, dtype=DTYPE.value)
    bytes_only = isinstance(loaded.tokenizer, ByteTokenizer)
    tokens = (
        "tokens are bytes" if bytes_only else f"with its tokenizer of {loaded.tokenizer.vocab_size:,} ids"
    )
    print(f"step {loaded.step} of {WORKDIR.value} in {FOLDER.value}: {hf_config.family_of(config)}, {tokens}")
