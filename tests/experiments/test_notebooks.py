import json
import pathlib

import jax
import matplotlib
import pytest

from tests.support.small_run import train_tiny

NOTEBOOKS = sorted(pathlib.Path("experiments/notebooks").glob("*.ipynb"))
SMALLER = {
    "learn_without_forgetting": dict(PEOPLE=2, COPIES=2, STEPS=4, SLOTS=4, OLD_BATCHES=2),
    "look_inside": dict(TEXT="read a slot", BATCHES=2),
}
"""Settings in place of those of a notebook's first cell."""
SAYS = {
    "learn_without_forgetting": (
        "full fine-tuning: ",
        "of the new facts (0% exactly)",
        "of the slots are read",
    ),
    "look_inside": ("the last token reads slot", "nats per token", "kB: file:///"),
}
"""Phrases that a notebook prints, beside the number of slots."""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of one step, in place of the demo's."""
    folder = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        return train_tiny(folder, folder, num_keys=16, steps=1)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, workdir, capsys):
    matplotlib.use("Agg")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):
        for cell in cells:
            assert not cell["outputs"]  # committed without outputs
            exec("".join(cell["source"]), names)
            if "WORKDIR" in names:
                names |= {"WORKDIR": workdir, **SMALLER.get(path.stem, {})}
    matplotlib.pyplot.close("all")
    printed = capsys.readouterr().out
    for said in ("1 memories of 256 slots", *SAYS.get(path.stem, ())):
        assert said in printed
