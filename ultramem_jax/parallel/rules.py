"""Decides how parameters are sharded: the logical axes of every parameter, and the mesh axes of these.

A parameter is identified by its name and that of the module around it. The trees of optimizers repeat these
names, so moments are sharded like their parameters.
"""

from functools import partial

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import ModelConfig
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.tree_types import ArrayTree

LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "output": ("embed", "vocab"),
    "attention/w_query": ("embed", "heads"),
    "attention/w_key": ("embed", "heads"),
    "attention/w_value": ("embed", "heads"),
    "attention/w_out": ("heads", "embed"),
    "attention/query_bias": ("heads",),
    "attention/key_bias": ("heads",),
    "attention/value_bias": ("heads",),
    "attention/output_bias": (None,),
    "feed_forward/w_in": ("embed", "mlp"),
    "feed_forward/w_gate": ("embed", "mlp"),
    "feed_forward/w_out": ("mlp", "embed"),
    "feed_forward/router": ("embed", None),
    "experts/w_in": ("expert", "embed", "mlp"),
    "experts/w_gate": ("expert", "embed", "mlp"),
    "experts/w_out": ("expert", "mlp", "embed"),
    "scale": (None,),
    "lora_a": (None, None),
    "lora_b": (None, None),
}
"""Logical axes of the parameters of layers, by name, or by module and name if several modules use the name.
`experts` are those of a Mixture of Experts, whose names are otherwise those of the MLP. The function
`logical_axes` adds the parameters of memories."""

MESH_AXES = {
    "embed": "fsdp",
    "keys": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "expert": "memory",
}
"""Logical axis -> mesh axis. An axis that the mesh axis does not divide stays whole (a vocabulary of 257)."""


LogicalAxes = dict[str, tuple[str | None, ...]]
"""Logical axes of parameters, by name or by `module/name`; None for an axis that is never split."""


def logical_axes(config: ModelConfig) -> LogicalAxes:
    """Returns the logical axes of every parameter of a model, keyed like `LOGICAL_AXES`."""
    of_memories = {
        f"{site.name}/{name}": parameter.axes
        for site in config.sites
        for name, parameter in site.parameters.items()
    }
    return LOGICAL_AXES | of_memories


def parameter_spec(
    path: jax.tree_util.KeyPath, shape: tuple[int, ...], axes: MeshAxes, logical_axes: LogicalAxes
) -> P:
    """Returns the partition spec of an array, by its path in a tree of parameters or of an optimizer's state.

    Args:
        path: keys of the leaf, as JAX gives them.
        shape: shape of the array.
        axes: the axes of the mesh.
        logical_axes: logical axes of the model's parameters.

    Raises:
        KeyError: the parameter's name is unknown.
    """
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if not isinstance(path[-1], jax.tree_util.DictKey) or not shape:
        return P()  # the optimizer's count, or its constants
    module = "experts" if len(shape) == 3 and names[-2:-1] == ["feed_forward"] else "/".join(names[-2:-1])
    name = names[-1]
    logical = logical_axes.get(f"{module}/{name}") or logical_axes[name]
    return P(*(_mesh_axis(axis, size, axes) for axis, size in zip(logical, shape, strict=True)))


def parameter_specs(tree: ArrayTree, axes: MeshAxes, logical_axes: LogicalAxes) -> ArrayTree:
    """Returns the `parameter_spec` of every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_spec(path, leaf.shape, axes, logical_axes), tree
    )


def gathered(params: ArrayTree, axes: MeshAxes | None, logical_axes: LogicalAxes) -> ArrayTree:
    """Gathers the parameters that are split over `fsdp`, and makes their gradients split again.

    Without this, the compiler may split activations by the width of the weights instead.
    """
    if axes is None or axes.mesh.shape["fsdp"] == 1:
        return params

    def gather(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        stored = parameter_spec(path, leaf.shape, axes, logical_axes)
        used = P(*(None if name == "fsdp" else name for name in stored))
        return leaf if used == stored else _between(leaf, axes.sharding(stored), axes.sharding(used))

    return jax.tree_util.tree_map_with_path(gather, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _between(x: jax.Array, stored: NamedSharding, used: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, used)


def _between_forward(x: jax.Array, stored: NamedSharding, used: NamedSharding) -> tuple[jax.Array, None]:
    return _between(x, stored, used), None


def _between_backward(
    stored: NamedSharding, used: NamedSharding, saved: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    del saved
    # Compilers for accelerators make one step of the sum over devices and the split.
    whole = jax.lax.with_sharding_constraint(cotangent, used)
    return (jax.lax.with_sharding_constraint(whole, stored),)


_between.defvjp(_between_forward, _between_backward)


def table_specs(tree: ArrayTree, axes: MeshAxes) -> ArrayTree:
    """Returns the partition specs of tables, their moments and other arrays per slot: by rows and columns.

    An array with a single column (one moment per row) is on every device that owns a part of the row.
    """

    def spec(leaf: jax.Array) -> P:
        if leaf.ndim == 0:
            return P()
        return P(axes.slots, *((axes.width if size > 1 else None) for size in leaf.shape[1:]))

    return jax.tree.map(spec, tree)


def _mesh_axis(logical: str | None, size: int, axes: MeshAxes) -> str | None:
    axis = MESH_AXES.get(logical or "")
    if axis is None or axes.mesh.shape[axis] == 1 or size % axes.mesh.shape[axis]:
        return None
    return axis
