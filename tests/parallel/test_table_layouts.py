"""Layouts of tables on TPUs, tried on the CPU with another layout than its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from ultramem_jax.config import MeshConfig
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.parallel.table_layouts import by_rows, laid_out
from ultramem_jax.platforms import targeting

HERE = SingleDeviceSharding(jax.devices()[0])
BY_COLUMNS = Layout((1, 0))


@pytest.mark.parametrize(
    "shape, named", [((1000, 192), True), ((1000, 128), False), ((1000,), False), ((), False)]
)
def test_layouts_are_named_where_a_tpu_would_choose_columns(shape, named):
    assert by_rows(shape, HERE) is HERE  # a CPU keeps rows in one piece
    with targeting("tpu"):
        found = by_rows(shape, HERE)
    assert found == Format(Layout((0, 1)), HERE) if named else found is HERE


def test_the_width_of_a_part_counts():
    mesh = make_mesh(MeshConfig(memory=2), jax.devices()[:2])
    columns = jax.NamedSharding(mesh, jax.P(None, "memory"))
    with targeting("tpu"):
        assert by_rows((64, 256), columns) is columns
        assert by_rows((64, 128), columns).layout == Layout((0, 1))


def test_an_array_gets_the_layout_of_its_leaf():
    leaf = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=Format(BY_COLUMNS, HERE))
    array = jnp.arange(12.0).reshape(4, 3)
    found = laid_out(array, leaf)
    assert found.format.layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(found, array)
    assert laid_out(found, leaf) is found
    assert laid_out(array, jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=HERE)) is array
