"""Keeps the measurements of `open_models`, in memory and in a file.

The report and its figure are made only from a `Study`, so they can be made again without measuring.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from experiments.common import report
from ultramem_jax.reporting.records import keep_record, kept_record
from ultramem_jax.training.evaluation import bits_per_byte
from ultramem_jax.tree_types import JsonDict

OURS = "ultramem_jax"
"""Name of this library among the programs that are timed."""
FLOAT32: Literal["float32"] = "float32"
BFLOAT16: Literal["bfloat16"] = "bfloat16"
DTYPES = (FLOAT32, BFLOAT16)
"""Dtypes of weights in which this library and `transformers` are timed."""


@dataclass(frozen=True)
class Model:
    """Describes the open model."""

    name: str
    num_bytes: int
    """Bytes of its files."""
    sha256: str
    """Hash of a GGUF file; blank for a folder."""
    parameters: int


@dataclass(frozen=True)
class Text:
    """Describes a text that models predict."""

    name: str
    num_bytes: int
    documents: int
    sha256: str
    """Hash of all documents in order, 64 hexadecimal digits."""


@dataclass(frozen=True)
class Quality:
    """Holds how well a model predicts a text."""

    model: str
    trained_on: str
    """Text that the model was trained on, in words."""
    parameters: int
    context: int
    """Most tokens that the model reads at once."""
    text: str
    num_bytes: int
    """Bytes of the text."""
    tokens: int
    """Tokens of the text, without those before its documents: every one is predicted once."""
    nats: float
    """Sum of the tokens' losses."""

    @property
    def bits_per_byte(self) -> float:
        """Returns the bits of all tokens over the bytes of the text."""
        return bits_per_byte(self.nats, self.num_bytes)


@dataclass(frozen=True)
class Continuation:
    """Holds a prompt, and how the model continues it."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Speed:
    """Holds the times of one program with one dtype of weights."""

    program: str
    dtype: str
    weight_bytes: int
    """Bytes of all weights."""
    prefill: tuple[float, ...]
    """Seconds from the prompt to the next token, one value per round."""
    decode: tuple[float, ...]
    """Seconds of all tokens after that, one value per round."""
    difference: float
    """Largest difference of the logits after the prompt to ours in float32, over the standard deviation of
    ours."""
    same_tokens: int
    """Number of first greedy tokens that are those of ours in float32."""

    def __post_init__(self) -> None:
        times = (*self.prefill, *self.decode)
        if len(self.prefill) != len(self.decode) or not times or min(times) <= 0:
            raise ValueError(f"{self.name}: times must be above 0, at least one, and as many of both kinds")

    @property
    def name(self) -> str:
        """Returns program and dtype."""
        return f"{self.program} {self.dtype}"


@dataclass(frozen=True)
class Settings:
    """Holds what the measurements were asked for."""

    prompt_tokens: int
    """Tokens of the prompt that is timed."""
    new_tokens: int
    """Tokens that are decoded after it and timed."""
    threads: int
    """CPU cores of every program."""
    prefill_chunk: int
    """Tokens of a prompt that this library reads at a time."""


@dataclass(frozen=True)
class Study:
    """Holds all measurements of a model; a part that was never asked for is empty."""

    environment: dict[str, str]
    """Strings from `describe_environment()`."""
    settings: Settings
    model: Model
    texts: list[Text] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    peers: dict[str, str] = field(default_factory=dict)
    """Versions of the other programs and of what they run on."""
    absent: dict[str, str] = field(default_factory=dict)
    """Programs that were not timed, and why."""

    @property
    def stem(self) -> str:
        """Returns the name of the study's files, without suffix."""
        device = report.device_kind(self.environment)
        return report.file_stem("open_models", device, on_cpu=report.is_cpu(self.environment))

    def with_parts_of(self, earlier: "Study") -> "Study":
        """Returns the study with the parts of an earlier one that it lacks, if that is of the same model."""
        if earlier.model != self.model:
            return self
        found = self
        if not self.qualities:
            found = dataclasses.replace(found, texts=earlier.texts, qualities=earlier.qualities)
        if not self.continuations:
            found = dataclasses.replace(found, continuations=earlier.continuations)
        if not self.speeds and not self.absent:
            timed = ("settings", "environment", "speeds", "peers", "absent")
            found = dataclasses.replace(found, **{name: getattr(earlier, name) for name in timed})
        if found == self:
            return self
        # The report names one command for the speeds, and one for the parts of the other run.
        other = self if found.environment is earlier.environment else earlier
        command = other.environment.get("command", "")
        return dataclasses.replace(found, environment=found.environment | {"command of other parts": command})

    def speed(self, program: str, dtype: str) -> Speed | None:
        """Returns the times of a program; None if it was not timed."""
        found = (speed for speed in self.speeds if (speed.program, speed.dtype) == (program, dtype))
        return next(found, None)

    def beside(self, speed: Speed) -> Speed | None:
        """Returns our times to compare with: of the same dtype, or of bfloat16 for quantised weights."""
        return self.speed(OURS, speed.dtype if speed.dtype in DTYPES else BFLOAT16)

    def tokens_per_second(self, seconds: Sequence[float], decode: bool) -> list[float]:
        """Returns the speed of every round."""
        tokens = self.settings.new_tokens if decode else self.settings.prompt_tokens
        return [tokens / each for each in seconds]

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the study as JSON, completely or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        return keep_record(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Study":
        """Reads a file that `save` wrote.

        Raises:
            UserError: the file cannot be read, or is not a study.
        """
        with kept_record(path, "a study of an open model") as read:
            return cls(
                environment=dict(read["environment"]),
                settings=Settings(**read["settings"]),
                model=Model(**read["model"]),
                texts=[Text(**record) for record in read["texts"]],
                qualities=[Quality(**record) for record in read["qualities"]],
                continuations=[Continuation(**record) for record in read["continuations"]],
                speeds=[_speed(record) for record in read["speeds"]],
                peers=dict(read["peers"]),
                absent=dict(read["absent"]),
            )


def same_beginning(tokens: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many first tokens are equal."""
    pairs = zip(tokens, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(other)))


def _speed(record: JsonDict) -> Speed:
    times = {name: tuple(record[name]) for name in ("prefill", "decode")}
    if not all(math.isfinite(seconds) for of_kind in times.values() for seconds in of_kind):
        raise ValueError("times must be finite")
    return Speed(**{**record, **times})
