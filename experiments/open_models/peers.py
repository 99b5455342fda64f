"""Starts `peer_process` with the Python of another environment, and times its models from here."""

import contextlib
import json
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.common.model_file import ModelFile
from experiments.open_models import peer_process
from experiments.open_models.records import DTYPES, FLOAT32
from experiments.open_models.speed import Timed
from ultramem_jax.accounting import count_parameters
from ultramem_jax.accounting.model import DTYPE_BYTES
from ultramem_jax.errors import UserError
from ultramem_jax.interop import open_models
from ultramem_jax.reporting.environment import cpu_cores

_PACKAGES = {"transformers": ("torch", "transformers"), "llama.cpp": ("llama-cpp-python",)}
"""Packages that each program needs."""


class PeerError(Exception):
    """Reports that a library cannot load or run the model."""


class PeerProcess:
    """Sends requests to a process of another Python, which stays alive until `peer_process` ends it."""

    def __init__(self, process: "subprocess.Popen[str]", errors: pathlib.Path):
        self._process, self._errors = process, errors

    def ask(self, action: str, **request: Any) -> dict[str, Any]:
        """Returns the answer to a request; see the module `peer_process`.

        Raises:
            PeerError: the request failed there.
            UserError: the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"action": action, **request}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = f": {said[-1]}" if said else ""
            raise UserError(f"peers_python: its process ended with status {self._process.wait()}{last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


@contextlib.contextmanager
def peer_process_of(python: str) -> Iterator[PeerProcess]:
    """Yields a process of the interpreter `python`, and ends it afterwards.

    Raises:
        UserError: the interpreter cannot be started.
    """
    with tempfile.TemporaryDirectory() as folder:
        errors = pathlib.Path(folder) / "errors"
        with errors.open("w") as file:
            try:
                process = subprocess.Popen(
                    [python, peer_process.__file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    encoding="utf-8",
                )
            except OSError as error:
                raise UserError(f"peers_python = {python!r}: must be a Python: {error.strerror}") from None
        try:
            yield PeerProcess(process, errors)
        finally:
            process.kill()
            process.communicate()


class Peer:
    """Times a model of another library."""

    def __init__(
        self, process: PeerProcess, program: str, dtype: str, weight_bytes: int, **load: Any
    ) -> None:
        """Loads the model there.

        Args:
            process: the other process.
            program: name of the library, one of `peer_process.LIBRARIES`.
            dtype: dtype of the weights.
            weight_bytes: their bytes.
            **load: further fields of the request `load`.

        Raises:
            PeerError: the library cannot load the model.
        """
        self.program, self.dtype, self.weight_bytes = program, dtype, weight_bytes
        self._process, self._name = process, f"{program} {dtype}"
        process.ask("load", name=self._name, library=program, dtype=dtype, **load)

    def run(self, ids: Sequence[int], new_tokens: int) -> Timed:
        """Reads a prompt and decodes greedily; see `speed.Contender`."""
        return Timed(**self._process.ask("run", name=self._name, ids=list(ids), new_tokens=new_tokens))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the logits (V,) after a prompt."""
        return np.array(self._process.ask("logits", name=self._name, ids=list(ids))["logits"])


class Peers(NamedTuple):
    """Holds the models of other programs, and what is known of the programs."""

    loaded: list[Peer]
    versions: dict[str, str]
    """Versions of the packages that are installed."""
    absent: dict[str, str]
    """Programs that are not timed, and why."""


def load_peers(process: PeerProcess, model: ModelFile, work: pathlib.Path, positions: int) -> Peers:
    """Loads the model into every program that the other Python has.

    `transformers` gets it as `open_models.save` writes it, in float32 and bfloat16. llama.cpp gets the GGUF
    file as it is.

    Args:
        process: the other process.
        model: the model.
        work: a folder for the weights that are saved.
        positions: tokens of prompt and continuation together.
    """
    versions = process.ask("describe")["versions"]
    absent = {
        program: f"the Python of `--peers_python` has no {' and no '.join(missing)}"
        for program, packages in _PACKAGES.items()
        if (missing := [f"`{package}`" for package in packages if versions[package] is None])
    }
    if not model.is_gguf:
        absent.setdefault("llama.cpp", "it reads only .gguf files")
    loaded: list[Peer] = []

    def load(program: str, dtype: str, weight_bytes: int, path: pathlib.Path) -> None:
        options = {"path": str(path), "threads": cpu_cores(), "positions": positions}
        try:
            loaded.append(Peer(process, program, dtype, weight_bytes, **options))
        except PeerError as error:
            absent[program] = f"it cannot load the model: {error}"

    if "transformers" not in absent:
        config, variables = open_models.load(model.path, FLOAT32)
        folder = work / "saved"
        open_models.save(folder, config, variables)
        del variables
        for dtype in DTYPES:
            load("transformers", dtype, DTYPE_BYTES[dtype] * count_parameters(config).total, folder)
    if "llama.cpp" not in absent:
        load("llama.cpp", model.weight_types(), model.num_bytes, model.path)
    return Peers(loaded, {name: version for name, version in versions.items() if version}, absent)
