"""Loads the corpus of a command: the one that the flags name, or the run's own, tokenized for the model."""

from dataclasses import replace

from absl import flags

from ultramem_jax.commands.given_model import WORKDIR
from ultramem_jax.commands.model_and_tokenizer import GivenModel
from ultramem_jax.config import DataConfig
from ultramem_jax.data import ByteTokenizer, Corpus, load_corpus
from ultramem_jax.errors import UserError, require
from ultramem_jax.training.continuing import check_corpus

DATASET = flags.DEFINE_string(
    "dataset", None, "corpus, as data.dataset of a run; of a run by default its own"
)
PATH = flags.DEFINE_string("path", "", "file or folder of --dataset, as data.path of a run")


def named_corpus(given: GivenModel, seq_len: int, default: str = "") -> tuple[DataConfig, Corpus]:
    """Returns the corpus that the flags name, or else that of the run.

    Args:
        given: the model.
        seq_len: S.
        default: dataset of an open model, where the flags name none.

    Raises:
        UserError: no corpus is known; --path is given without --dataset; the text of the run is another one
            now; see also `load_corpus`.
    """
    run = given.run
    dataset = DATASET.value if DATASET.value is not None or run is not None else default
    require(DATASET.value is not None or not PATH.present, "--path", PATH.value, "needs --dataset")
    if dataset is None and run is not None:
        data = replace(run.config.data, seq_len=seq_len)
        corpus = load_corpus(data, run.tokenizer)
        check_corpus(run.corpus, corpus, WORKDIR.value)
        return data, corpus
    if not dataset:
        own = "; the training text of an open model is not known" if run is None else ""
        raise UserError(f"--dataset: must name a dataset{own}")
    # The tokenizer is at hand, so that its file needs no name of its own.
    kind = "bytes" if isinstance(given.tokenizer, ByteTokenizer) else given.title
    cache = run.config.data.cache_dir if run is not None else ""
    data = DataConfig(dataset, PATH.value, tokenizer=kind, seq_len=seq_len, cache_dir=cache)
    return data, load_corpus(data, given.tokenizer)
