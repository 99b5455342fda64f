"""Runs commands and experiments as the command line does, one after another in one process."""

import sys

import pytest
from absl import flags

import launch
from experiments import EXPERIMENTS
from ultramem_jax.commands import COMMANDS

TINY = [
    "--preset=ultramem-tiny",
    "--config.model.embed_dim=16",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=2",
    "--config.model.mlp_dim=16",
    "--config.model.memory.placement=1:1",
    "--config.model.memory.address.num_keys=16",
    "--config.model.memory.address.top_m=4",
    "--config.model.memory.address.key_dim=8",
    "--config.model.memory.table.value_dim=8",
    "--config.data.seq_len=16",
    "--config.train.batch_size=8",
    "--config.train.steps=2",
    "--config.train.eval_batches=2",
]
"""Flags of a run that trains in seconds."""


@pytest.fixture(autouse=True, scope="module")
def on_one_device(one_device):
    """Runs every program on one device."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Returns flags that name a small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("the slot of a key is read by a query\n" * 200)
    return [
        "--config.data.dataset=text",
        f"--config.data.path={folder / 'text.txt'}",
        f"--config.data.cache_dir={folder / 'cache'}",
    ]


def _forget_flags():
    """Forgets all flags: a process parses its flags once, and here programs follow each other in one."""
    values = flags.FLAGS
    rooms = ("experiments.", "ultramem_jax.commands.", "ml_collections.")
    by_module = {m: of for m, of in values.flags_by_module_dict().items() if m.startswith(rooms)}
    own = [flag.name for defined in by_module.values() for flag in defined]
    for name in {*own, *(n for n in values if n == "config" or n.startswith("config."))}:
        delattr(values, name)
    values.unparse_flags()
    modules = {command.module for command in (COMMANDS | EXPERIMENTS).values()}
    for module in modules | {m for m in by_module if m.startswith("ultramem_jax.commands.")}:
        sys.modules.pop(module, None)


@pytest.fixture
def run(capsys, monkeypatch):
    """Returns a function that runs a program and returns its status, output and errors."""

    def run(*argv):
        _forget_flags()
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, argv)])
        status = launch.main(sys.argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
