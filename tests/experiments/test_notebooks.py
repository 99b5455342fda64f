import json
import pathlib

import jax
import matplotlib
import pytest

from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families
from ultramem_jax.training.loop import train

NOTEBOOKS = sorted(pathlib.Path("experiments/notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of one step, in place of the demo's."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("read a slot\n" * 300)
    memory = families.ultramem(placement="1:1", num_keys=16, top_m=4, key_dim=8, value_dim=8)
    config = RunConfig(
        ModelConfig(
            embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=16, memories={"memory": memory}
        ),
        DataConfig("text", str(folder / "text.txt"), seq_len=16, cache_dir=str(folder / "cache")),
        TrainConfig(steps=1, batch_size=8, eval_batches=1),
    )
    with jax.numpy_dtype_promotion("standard"):
        train(config, folder, progress=False)
    return folder


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
