"""Runs language models in other libraries for `open_models`, which times them beside this one.

It is a program of its own, for the Python of an environment that has these libraries, and imports nothing
else of the project. It reads requests, one JSON object per line, from standard input, and answers each with
one line on standard output:

- `describe` -> `versions`: version of each package, null for those that are not installed;
- `load` (`name`, `library`, `path`, `dtype`, `threads`, `positions`) -> nothing;
- `logits` (`name`, `ids`) -> `logits`: those after the last id;
- `run` (`name`, `ids`, `new_tokens`) -> `prefill` and `decode` in seconds, and the greedy `tokens`.

What fails is answered with `error`.
"""

import importlib
import importlib.metadata
import inspect
import json
import os
import sys
import time
from typing import Any, Protocol

PACKAGES = ("torch", "transformers", "llama-cpp-python")


class Model(Protocol):
    """Describes a model with a cache of the tokens so far."""

    def restart(self) -> None:
        """Empties the cache."""

    def read(self, ids: list[int]) -> Any:
        """Reads ids after those in the cache, and returns the logits (V,) after the last one."""

    def best(self, logits: Any) -> int:
        """Returns the id of the largest logit."""


class TransformersModel:
    """Runs a folder of Hugging Face in `transformers`, as it loads it by default, on the CPU."""

    def __init__(self, path: str, dtype: str, threads: int, positions: int):
        self._torch = importlib.import_module("torch")
        self._transformers = importlib.import_module("transformers")
        self._torch.set_num_threads(threads)
        of_path = self._transformers.AutoModelForCausalLM.from_pretrained
        self._model = of_path(path, dtype=getattr(self._torch, dtype)).eval()
        # The argument has another name from 5.24 on.
        known = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        self._cache: Any = None

    def restart(self) -> None:
        """Makes a new cache."""
        self._cache = self._transformers.DynamicCache(config=self._model.config)

    def read(self, ids: list[int]) -> Any:
        """Returns the logits as a tensor (V,) in the dtype of the weights."""
        with self._torch.inference_mode():
            tokens = self._torch.tensor([ids])
            cached = {self._cache_name: self._cache, "use_cache": True}
            return self._model(input_ids=tokens, logits_to_keep=1, **cached).logits[0, -1]

    def best(self, logits: Any) -> int:
        """Returns the id of the largest logit."""
        return int(logits.argmax())


class LlamaModel:
    """Runs a GGUF file as it is in `llama-cpp-python`, on the CPU."""

    def __init__(self, path: str, dtype: str, threads: int, positions: int):
        self._library = importlib.import_module("llama_cpp")
        self._numpy = importlib.import_module("numpy")
        self._model = self._library.Llama(
            model_path=path,
            n_ctx=positions,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def restart(self) -> None:
        """Empties the cache."""
        self._model.reset()

    def read(self, ids: list[int]) -> Any:
        """Returns the logits as an array (V,) float32, which lasts until the next call."""
        self._model.eval(ids)
        found = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return self._numpy.ctypeslib.as_array(found, (self._model.n_vocab(),))

    def best(self, logits: Any) -> int:
        """Returns the id of the largest logit."""
        return int(logits.argmax())


LIBRARIES: dict[str, Any] = {"transformers": TransformersModel, "llama.cpp": LlamaModel}


def run(model: Model, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Returns the seconds from the prompt to the next token, those of all others, and the tokens."""
    begin = time.perf_counter()
    model.restart()
    tokens = [model.best(model.read(ids))]
    middle = time.perf_counter()
    for _ in range(new_tokens):
        tokens.append(model.best(model.read(tokens[-1:])))
    end = time.perf_counter()
    return {"prefill": middle - begin, "decode": end - middle, "tokens": tokens}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def answer(models: dict[str, Model], request: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer to one request.

    Args:
        models: models by name, to which `load` adds.
        request: see the module.
    """
    action = request.pop("action")
    if action == "describe":
        return {"versions": _versions()}
    name = request.pop("name")
    if action == "load":
        models[name] = LIBRARIES[request.pop("library")](**request)
        return {}
    if action == "logits":
        models[name].restart()
        return {"logits": [float(value) for value in models[name].read(request["ids"])]}
    return run(models[name], **request)


def main() -> None:
    """Answers requests until there are no more."""
    # Libraries print what they like, so the answers get a standard output of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    models: dict[str, Model] = {}
    for line in sys.stdin:
        try:
            answered = answer(models, json.loads(line))
        except Exception as error:  # libraries fail in any way they like
            reason = next(iter(str(error).splitlines()), "")
            answered = {"error": f"{type(error).__name__}: {reason}"}
        print(json.dumps(answered), file=answers, flush=True)


if __name__ == "__main__":
    # Packages must not find the modules beside this file under the names of their own.
    sys.path = [
        entry for entry in sys.path if os.path.abspath(entry) != os.path.dirname(os.path.abspath(__file__))
    ]
    main()
