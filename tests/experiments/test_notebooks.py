import json
import pathlib

import jax
import matplotlib
import pytest

from tests.support.small_run import train_tiny

NOTEBOOKS = sorted(pathlib.Path("experiments/notebooks").glob("*.ipynb"))


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
                names["WORKDIR"] = workdir
    matplotlib.pyplot.close("all")
    assert "1 memories of 256 slots" in capsys.readouterr().out
