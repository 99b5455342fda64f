"""Reads the commands of guides, and makes runs of them that take seconds."""

import re

import pytest

from tests.support.documents import GUIDES, shell_commands
from ultramem_jax.commands import COMMANDS
from ultramem_jax.data import builder

SMALL = ("embed_dim=32", "num_layers=1", "num_heads=2", "num_kv_heads=2", "mlp_dim=32")
SMALL_MEMORY = {
    "ultramem-tiny": ("placement=1:1", "num_keys=16", "value_dim=8"),
    "engram-tiny": ("placement=before@1", "rows_per_head=(64,)"),
}
"""Fields of the memory, by preset."""
OF_TEXT = ("data.dataset=text", "data.path=my_text")
QUICK = ("batch_size=8", "eval_batches=1", "log_every=1")
STEPS = re.compile(r"--config\.train\.steps=(\d+)")
DEVICES = 8
"""Devices of a process, in the guide to many devices."""


def commands(guide):
    """Yields the commands of a guide, without what starts them and without settings of the shell."""
    for words in shell_commands(GUIDES / f"{guide}.md"):
        if words[0] == "ultramem":
            assert words[1] in COMMANDS, words
            yield words[1:]
        elif words[:2] == ["python", "launch.py"]:
            yield words[2:]
        elif words[:3] == ["python", "-m", "ultramem_jax"]:
            yield words[3:]
        elif words[0] == "pip" or words[:3] == ["python", "-m", "zipfile"]:
            continue  # what is installed and downloaded is there in a test
        elif words[:2] == ["python", "-c"]:
            assert "ultramem_jax.__main__" in words[2], words
            yield words[3:]
        else:
            assert words == ["export", f"JAX_NUM_CPU_DEVICES={DEVICES}"], words


def smaller(words):
    """Returns the command; if it trains, with fewer steps, on a text, a model that compiles in seconds."""
    if words[0] != "train":
        return words
    words = [STEPS.sub(lambda m: f"--config.train.steps={max(int(m[1]) // 500, 1)}", word) for word in words]
    if any(word.startswith("--init_from=") for word in words):
        of_text = () if "--config.data.dataset" in " ".join(words) else OF_TEXT
        fields = (*of_text, "data.seq_len=32")
        return [*words, *(f"--config.train.{field}" for field in QUICK), *(f"--config.{f}" for f in fields)]
    preset = next((word.removeprefix("--preset=") for word in words if word.startswith("--preset=")), None)
    memory = SMALL_MEMORY[preset or "ultramem-tiny"]
    model = [*SMALL, *(f"memory.{field}" for field in memory)]
    words += [f"--config.model.{field}" for field in model] + [f"--config.train.{field}" for field in QUICK]
    if "--config.data.dataset=text" not in words and not any(word.startswith("--config=") for word in words):
        words += [f"--config.{field}" for field in OF_TEXT]
    return words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a user's folder with texts in it the current one, and returns it."""
    texts = tmp_path / "my_text"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(
            f"Once slot {number} of a key was read by query {number**2}. " * 20
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builder, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path
