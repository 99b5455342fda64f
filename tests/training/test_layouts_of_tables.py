"""Tables keep a layout that is not the device's own through training, saving, resuming and loading."""

import signal

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.training import checkpoint_reading, loop, state
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import MetricWriter
from ultramem_jax.training.restore import load_model


def _by_columns(shape, sharding):
    return Format(Layout((1, 0)), sharding) if len(shape) == 2 else sharding


@pytest.mark.parametrize("large_bytes", [1 << 40, 1000])
def test_layouts(config, tmp_path, monkeypatch, large_bytes):
    one_device = make_mesh(config.mesh, jax.devices()[:1])
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: one_device)
    expected = train(config, tmp_path / "plain", progress=False).state
    workdir = tmp_path / "by_columns"
    with monkeypatch.context() as patch:
        for module in (state, loop):
            patch.setattr(module, "by_rows", _by_columns)
        patch.setattr(checkpoint_reading, "LARGE_BYTES", large_bytes)
        with patch.context() as stopping:
            stopping.setattr(MetricWriter, "write", lambda *_: signal.raise_signal(signal.SIGTERM))
            assert not train(config, workdir, progress=False).finished
        found = train(config, workdir, progress=False).state
        loaded = load_model(workdir).variables["memory"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for name, parts in expected.tables.items():
        for part, table in parts.items():
            for other in (found.tables[name][part], loaded[name][part]):
                assert other.format.layout.major_to_minor == (1, 0)
                np.testing.assert_array_equal(other, table)
