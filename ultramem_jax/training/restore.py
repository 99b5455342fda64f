"""Loads a trained model from its run's folder, for evaluation, sampling and notebooks."""

import dataclasses
import logging
import pathlib

import jax

from ultramem_jax.config import DataConfig, RunConfig
from ultramem_jax.data import BpeTokenizer, ByteTokenizer, FileTokenizer, Tokenizer, open_tokenizer
from ultramem_jax.errors import UserError, whole_number
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.training.checkpoint_reading import saved_config
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.continuing import check_tokenizer, tokenizer_identity
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.lora import merged
from ultramem_jax.training.state import abstract_state, reaches
from ultramem_jax.tree_types import ArrayTree, JsonDict

log = logging.getLogger(__name__)

_TOKENIZER_FILE = "tokenizer.json"
_AGAIN = "remove it if it is there, and the run's training, started again, writes it anew"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """Holds a trained model: `Transformer(config.model).apply(variables, tokens)` works."""

    config: RunConfig
    variables: dict[str, ArrayTree]
    """`params`, `memory` and `buffers`; moments are not read. LoRA's factors are merged into the matrices
    that they adapt. Tables are as `ultramem_jax.ops.rows` stores them: `from_stored(table)` decodes the
    stored bits to bfloat16."""
    tokenizer: Tokenizer
    step: int
    corpus: JsonDict
    """Identity of its data, as the checkpoint holds it: `corpus_hash` and sizes."""


def load_model(workdir: str | pathlib.Path, checkpoint: str | int = "last") -> LoadedModel:
    """Loads a run's model. Its config comes from the checkpoint itself.

    Args:
        workdir: folder of the run.
        checkpoint: `last`, `best` (by validation loss), or a step.

    Raises:
        UserError: no such folder, step or whole checkpoint, or a tokenizer that is lost, damaged or not the
            run's own.
    """
    folder = pathlib.Path(workdir) / "checkpoints"
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = _step(checkpoints, checkpoint)
        meta = checkpoints.read_meta(step)
        config = saved_config(folder / str(meta.step), meta.config)
        # The model goes only to the first device, whatever the run was trained on.
        config = for_this_device(config)
        abstract = abstract_state(config, make_optimizers(config), one_device())
        parts = {"params": abstract.params, "tables": abstract.tables, "buffers": abstract.buffers}
        # An empty collection (a model without memories) is not an entry of the checkpoint.
        wanted = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
        restored = checkpoints.restore_subtree(wanted, meta.step).state
    variables = {
        "params": restored["params"],
        "memory": restored.get("tables", {}),
        "buffers": restored.get("buffers", {}),
    }
    return LoadedModel(
        config=config,
        variables=merged(variables, config.train),
        tokenizer=_tokenizer(config, pathlib.Path(workdir), meta.corpus),
        step=meta.step,
        corpus=meta.corpus,
    )


def for_this_device(config: RunConfig) -> RunConfig:
    """Returns the config of a run with every table in a memory that the first device here can reach."""
    memories = {
        name: memory if reaches(memory.table.memory_kind) else memory.changed(memory_kind="device")
        for name, memory in config.model.memories.items()
    }
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memories=memories))


def run_config(workdir: str | pathlib.Path) -> RunConfig:
    """Returns the config that the newest checkpoint of a run holds, without reading its arrays.

    Raises:
        UserError: no such folder, or no whole checkpoint.
    """
    folder = pathlib.Path(workdir) / "checkpoints"
    with Checkpoints(folder, read_only=True) as checkpoints:
        meta = checkpoints.read_meta()
    return saved_config(folder / str(meta.step), meta.config)


def is_run(folder: str | pathlib.Path) -> bool:
    """Tells whether a folder is that of a run: it has checkpoints, and no model in Hugging Face's form."""
    folder = pathlib.Path(folder)
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").exists()


def tokenizer_setting(workdir: str | pathlib.Path, data: DataConfig) -> str:
    """Returns what `DataConfig.tokenizer` must be for another run with the tokenizer of this one.

    Args:
        workdir: folder of the run.
        data: its data.
    """
    return "bytes" if data.tokenizer == "bytes" else str(pathlib.Path(workdir) / _TOKENIZER_FILE)


def save_tokenizer(tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """Keeps the tokenizer with the run, so that the model loads without its corpus and the tokenizer's file.

    Raises:
        OSError: it cannot be written.
    """
    if isinstance(tokenizer, BpeTokenizer):
        tokenizer.save(workdir / _TOKENIZER_FILE)
    elif isinstance(tokenizer, FileTokenizer):
        tokenizer.save(workdir)


def mend_tokenizer(tokenizer: Tokenizer, workdir: pathlib.Path) -> None:
    """Writes the tokenizer of a run again where its file is lost or damaged, and says so in the log.

    Raises:
        UserError: the file holds another tokenizer.
        OSError: it cannot be written.
    """
    path = workdir / _TOKENIZER_FILE
    if not isinstance(tokenizer, BpeTokenizer | FileTokenizer):
        return
    try:
        there = _kept(workdir, trained=isinstance(tokenizer, BpeTokenizer))
    except UserError as error:
        if path.is_dir():
            raise UserError(f"{error}; {_AGAIN}") from None
        log.warning("%s; it is written again", error)
        save_tokenizer(tokenizer, workdir)
    else:
        identity = tokenizer_identity(tokenizer)
        check_tokenizer(identity, there, str(path), workdir, _AGAIN)


def kept_tokenizer(data: DataConfig, workdir: str | pathlib.Path) -> Tokenizer | None:
    """Returns the copy that a run keeps of a file's tokenizer, if the file itself is no longer there.

    With it `load_corpus` resumes a run on a machine that does not have the file.

    Raises:
        UserError: the copy is damaged.
    """
    lost = data.tokenizer not in ("bytes", "bpe") and not pathlib.Path(data.tokenizer).expanduser().exists()
    folder = pathlib.Path(workdir)
    return _kept(folder, trained=False) if lost and (folder / _TOKENIZER_FILE).is_file() else None


def _tokenizer(config: RunConfig, workdir: pathlib.Path, corpus: JsonDict) -> Tokenizer:
    if config.data.tokenizer == "bytes":
        return ByteTokenizer()
    try:
        tokenizer = _kept(workdir, trained=config.data.tokenizer == "bpe")
    except UserError as error:
        raise UserError(f"{error}; {_AGAIN}") from None
    check_tokenizer(corpus, tokenizer, str(workdir / _TOKENIZER_FILE), workdir, _AGAIN)
    return tokenizer


def _kept(workdir: pathlib.Path, trained: bool) -> Tokenizer:
    """Returns the tokenizer in the folder of a run: one that was trained on its corpus, or of a file."""
    path = workdir / _TOKENIZER_FILE
    return BpeTokenizer.load(path) if trained else open_tokenizer(path)


def _step(checkpoints: Checkpoints, checkpoint: str | int) -> int | None:
    """Returns the requested step; None for the newest whole checkpoint."""
    if checkpoint == "last":
        return None
    if checkpoint == "best":
        best = checkpoints.best_step()
        if best is None:
            raise UserError(
                "--checkpoint = 'best': no checkpoint here has a validation loss; allowed is 'last'"
            )
        return best
    step = whole_number(str(checkpoint))
    if step is None or step not in checkpoints.all_steps():
        steps = ", ".join(map(str, checkpoints.all_steps()))
        raise UserError(f"--checkpoint = {checkpoint!r}: allowed are 'last', 'best' and the steps {steps}")
    return step
