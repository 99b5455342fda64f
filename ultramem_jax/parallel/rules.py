"""How parameters lie on the mesh: the logical axes of every parameter, and the mesh axes of these.

A parameter is known by its name and that of the module around it; the trees of optimizers repeat these names,
so that moments lie as their parameters do.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import ModelConfig
from ultramem_jax.ops.on_mesh import MeshAxes

LOGICAL_AXES: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "output": ("embed", "vocab"),
    "attention/w_query": ("embed", "heads"),
    "attention/w_key": ("embed", "heads"),
    "attention/w_value": ("embed", "heads"),
    "attention/w_out": ("heads", "embed"),
    "feed_forward/w_in": ("embed", "mlp"),
    "feed_forward/w_gate": ("embed", "mlp"),
    "feed_forward/w_out": ("mlp", "embed"),
    "feed_forward/router": ("embed", None),
    "experts/w_in": ("expert", "embed", "mlp"),
    "experts/w_gate": ("expert", "embed", "mlp"),
    "experts/w_out": ("expert", "mlp", "embed"),
    "scale": (None,),
}
"""Of the parameters of layers, by their names or, where several modules use one, the module's and its own.
The experts of a Mixture of Experts stand apart from the MLP, which has the same names. Memories say theirs
themselves: `logical_axes`."""

MESH_AXES = {
    "embed": "fsdp",
    "keys": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "expert": "memory",
}
"""Logical axis -> mesh axis. What the mesh axis does not divide stays whole (a vocabulary of 257, say)."""


LogicalAxes = dict[str, tuple[str | None, ...]]


def logical_axes(config: ModelConfig) -> LogicalAxes:
    """Returns the logical axes of every parameter of a model, as `LOGICAL_AXES` has them."""
    of_memories = {
        f"{site.name}/{name}": parameter.axes
        for site in config.sites
        for name, parameter in site.parameters.items()
    }
    return LOGICAL_AXES | of_memories


def parameter_spec(path: Any, shape: tuple[int, ...], axes: MeshAxes, logical_axes: LogicalAxes) -> P:
    """How an array lies on the mesh, by its place in a tree of parameters or of an optimizer's state.

    Args:
        path: keys of the leaf, as JAX gives them.
        shape: of the array.
        axes: of the mesh.
        logical_axes: of the model's parameters.

    Raises:
        KeyError: a parameter of unknown name.
    """
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if not isinstance(path[-1], jax.tree_util.DictKey) or not shape:
        return P()  # a count of the optimizer's, or constants of its own
    module = "experts" if len(shape) == 3 and names[-2:-1] == ["feed_forward"] else "/".join(names[-2:-1])
    name = names[-1]
    logical = logical_axes.get(f"{module}/{name}") or logical_axes[name]
    return P(*(_mesh_axis(axis, size, axes) for axis, size in zip(logical, shape, strict=True)))


def parameter_specs(tree: Any, axes: MeshAxes, logical_axes: LogicalAxes) -> Any:
    """`parameter_spec` of every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_spec(path, leaf.shape, axes, logical_axes), tree
    )


def gathered(params: Any, axes: MeshAxes | None, logical_axes: LogicalAxes) -> Any:
    """Parameters as a step uses them: those split over `fsdp` whole, and their gradients split again.

    Left to itself, the compiler may split activations by the width of the weights instead.
    """
    if axes is None or axes.mesh.shape["fsdp"] == 1:
        return params

    def gather(path: Any, leaf: jax.Array) -> jax.Array:
        stored = parameter_spec(path, leaf.shape, axes, logical_axes)
        used = P(*(None if name == "fsdp" else name for name in stored))
        return leaf if used == stored else _between(leaf, axes.sharding(stored), axes.sharding(used))

    return jax.tree_util.tree_map_with_path(gather, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _between(x: jax.Array, stored: NamedSharding, used: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, used)


def _between_forward(x, stored, used):
    return _between(x, stored, used), None


def _between_backward(stored, used, saved, cotangent):
    del saved
    # A sum over devices, then a part of it: compilers for accelerators make one step of the two.
    whole = jax.lax.with_sharding_constraint(cotangent, used)
    return (jax.lax.with_sharding_constraint(whole, stored),)


_between.defvjp(_between_forward, _between_backward)


def table_specs(tree: Any, axes: MeshAxes) -> Any:
    """How tables, their moments and what is kept per slot lie on the mesh: split by rows and columns.

    Columns of which there is one (a moment per row) are on every device that has some of the row.
    """

    def spec(leaf: Any) -> P:
        if leaf.ndim == 0:
            return P()
        return P(axes.slots, *((axes.width if size > 1 else None) for size in leaf.shape[1:]))

    return jax.tree.map(spec, tree)


def _mesh_axis(logical: str | None, size: int, axes: MeshAxes) -> str | None:
    axis = MESH_AXES.get(logical or "")
    if axis is None or axes.mesh.shape[axis] == 1 or size % axes.mesh.shape[axis]:
        return None
    return axis
