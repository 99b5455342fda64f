"""Holds everything that changes during training in one tree, which is what a checkpoint stores."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from ultramem_jax.config import RunConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.errors import require
from ultramem_jax.models import Transformer
from ultramem_jax.ops.on_mesh import MeshAxes, current_axes, on_mesh
from ultramem_jax.parallel.rules import logical_axes, parameter_specs, table_specs
from ultramem_jax.parallel.table_layouts import by_rows, placement, placements
from ultramem_jax.training.dense_optimizer import Optimizers
from ultramem_jax.training.initial import Initial, placed, with_zero_outputs, without
from ultramem_jax.training.lora import with_factors
from ultramem_jax.training.slot_selection import needs_background
from ultramem_jax.training.slot_usage import SlotUsage, init_usage
from ultramem_jax.training.trainable import overlaid, require_some, selected
from ultramem_jax.tree_types import ArrayTree, Variables

_LORA_STREAM = 0x10A
"""Number of the stream of random numbers that draws LoRA's factors, apart from the model's own."""


class TrainState(flax.struct.PyTreeNode):
    """Holds the state of a run between two steps."""

    step: jax.Array
    """() int32, the number of steps done."""
    params: ArrayTree
    """Dense parameters: the `params` collection, and LoRA's factors (`training.lora`)."""
    opt_state: optax.OptState
    """State of the optimizer of the dense parameters that learn, as optax keeps it."""
    tables: dict[str, dict[str, jax.Array]]
    """The `memory` collection: per table `values` (N, d_v) and, if there are any, `pre_values` (N, d_p)."""
    table_state: ArrayTree
    """State of the tables' optimizer. In the row-sparse way it is, per array of a table that learns, the
    state of its `RowRule`, which is empty for plain SGD. In the dense way it is optax's state."""
    usage: dict[str, SlotUsage]
    """`SlotUsage` of each table, by the name of the table."""
    background: dict[str, jax.Array]
    """Per table what the selection of rows takes from the background, (N,) float32
    (`slot_selection.background_weights`). It is empty unless the run selects rows by it."""
    buffers: ArrayTree
    """The `buffers` collection: the last rank-1 vectors and the stored permutations."""
    seed: jax.Array
    """() uint32. Together with the step, it determines every random number of the run."""


def init_state(config: RunConfig, optimizers: Optimizers, seed: jax.Array | None = None) -> TrainState:
    """Returns the state at step 0.

    The function is traceable: compile it, or ask `jax.eval_shape` for its shapes.

    Args:
        config: the run's config.
        optimizers: the result of `make_optimizers`.
        seed: () uint32; `train.seed` if None.
    """
    seed = jnp.asarray(config.train.seed, jnp.uint32) if seed is None else seed
    model = Transformer(config.model)
    axes = current_axes()
    # The fewest tokens that the mesh allows: one sequence for every device that has its own tokens.
    tokens = jnp.zeros((1 if axes is None else axes.size(axes.tokens), 2), jnp.int32)
    return state_of(config, optimizers, model.init(jax.random.key(seed), tokens), seed)


def state_of(config: RunConfig, optimizers: Optimizers, variables: Variables, seed: jax.Array) -> TrainState:
    """Returns the state at step 0 of a module with these variables.

    Weights of the background are zeros: they come from a file, by `Initial`.

    Args:
        config: the run's config; says how tables are trained.
        optimizers: the result of `make_optimizers`.
        variables: `params` and, with memories, `memory` and `buffers`, named as in the model of `config`.
        seed: () uint32, of the random numbers of all steps.
    """
    tables, train = variables.get("memory", {}), config.train
    lora_key = jax.random.fold_in(jax.random.key(seed), _LORA_STREAM)
    params = with_factors(variables["params"], train, lora_key)
    require_some(params, tables, train.trainable)
    learning = selected(tables, train.trainable)
    allowed = "must match a table, such as '/values$', while train.slots_per_step is above 0"
    require(not train.slots_per_step or bool(learning), "train.trainable", train.trainable, allowed)
    if train.table_gradient == "dense":
        table_state: ArrayTree = optimizers.tables.init(learning)
    else:
        table_state = {
            name: {part: optimizers.rows[name].init(rows) for part, rows in learning.get(name, {}).items()}
            for name in tables
        }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizers.params.init(selected(params, train.trainable)),
        tables=tables,
        table_state=table_state,
        usage={name: init_usage(_num_slots(table)) for name, table in tables.items()},
        background={
            name: jnp.zeros(_num_slots(table), jnp.float32)
            for name, table in tables.items()
            if needs_background(train)
        },
        buffers=variables.get("buffers", {}),
        seed=seed,
    )


def _num_slots(table: dict[str, jax.Array]) -> int:
    return table["values"].shape[0]


def fresh_state(
    config: RunConfig,
    optimizers: Optimizers,
    axes: MeshAxes,
    seed: np.uint32,
    abstract: TrainState | None = None,
    initial: Initial | None = None,
) -> TrainState:
    """Returns the state at step 0, each array placed as `abstract_state` says.

    The numbers are the same on every mesh.

    Tables for host memory are drawn one at a time, so that the device needs room for only one of them.

    Args:
        config: the run's config.
        optimizers: the result of `make_optimizers`.
        axes: the axes of the mesh.
        seed: seed of all draws.
        abstract: the result of `abstract_state`, where it is at hand. Otherwise the model is traced once more
            for it.
        initial: variables that are not drawn; None draws all.

    Raises:
        UserError: `initial` has other variables, or other shapes, than the model of the config.
    """
    initial = initial or Initial({})
    trees = initial.trees()

    def init(seed: jax.Array) -> TrainState:
        with on_mesh(axes):
            state = init_state(config, optimizers, seed)
        zeroed = with_zero_outputs(config.model, state.params, state.tables, initial.grafted)
        return state.replace(params=zeroed[0], tables=zeroed[1])

    def drawn(state: TrainState) -> TrainState:
        """Returns the state without what is given."""
        return state.replace(**{field: without(getattr(state, field), of) for field, of in trees.items()})

    abstract = abstract or abstract_state(config, optimizers, axes)
    given = {field: placed(of, getattr(abstract, field), field) for field, of in trees.items()}
    wanted = drawn(abstract)
    # The compiler keeps only what a program's result needs, so each program below draws only its own arrays.
    if all(memory.table.memory_kind == "device" for memory in config.model.memories.values()):
        state = jax.jit(lambda seed: drawn(init(seed)), out_shardings=placements(wanted))(seed)
    else:
        small = placements(wanted).replace(tables={}, table_state={})
        state = jax.jit(
            lambda seed: drawn(init(seed)).replace(tables={}, table_state={}), out_shardings=small
        )(seed)
        tables: dict[str, dict[str, jax.Array]] = {name: {} for name in wanted.tables}
        for name, parts in wanted.tables.items():
            for part, table in parts.items():
                how = placement(table)
                draw = jax.jit(lambda seed, n=name, p=part: init(seed).tables[n][p], out_shardings=how)
                tables[name][part] = draw(seed)
        zeros = jax.tree.map(
            lambda a: jax.device_put(np.zeros(a.shape, a.dtype), placement(a)), abstract.table_state
        )
        state = state.replace(tables=tables, table_state=zeros)
    return state.replace(**{field: overlaid(getattr(state, field), of) for field, of in given.items()})


def abstract_state(config: RunConfig, optimizers: Optimizers, axes: MeshAxes) -> TrainState:
    """Returns shapes, dtypes and shardings of the state.

    Tables and their moments are split by rows and columns. Parameters and their moments are split by the
    rules of `ultramem_jax.parallel.rules`. Everything else is on every device.

    Args:
        config: the run's config.
        optimizers: the result of `make_optimizers`.
        axes: the axes of the mesh.
    """
    with on_mesh(axes):
        state = jax.eval_shape(lambda: init_state(config, optimizers))
    kinds = {site.table: _memory_kind(site) for site in config.model.sites}

    def placed(tree: ArrayTree, specs: ArrayTree, kind: str | None = None) -> ArrayTree:
        def place(leaf: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
            sharding = axes.sharding(spec)
            how = sharding if kind is None else by_rows(leaf.shape, sharding.with_memory_kind(kind))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=how)

        return jax.tree.map(place, tree, specs)

    def of_tables(tree: ArrayTree) -> ArrayTree:
        """Places the state of each table. The dense way's state is optax's own, and stays on the device."""
        if config.train.table_gradient == "dense":
            return placed(tree, table_specs(tree, axes))
        return {name: placed(of, table_specs(of, axes), kinds[name]) for name, of in tree.items()}

    everywhere = jax.tree.map(lambda _: P(), state)
    rest, logical = placed(state, everywhere), logical_axes(config.model)
    return rest.replace(
        params=placed(state.params, parameter_specs(state.params, axes, logical)),
        opt_state=placed(state.opt_state, parameter_specs(state.opt_state, axes, logical)),
        tables={name: placed(of, table_specs(of, axes), kinds[name]) for name, of in state.tables.items()},
        table_state=of_tables(state.table_state),
        usage=placed(state.usage, table_specs(state.usage, axes)),
        background=placed(state.background, table_specs(state.background, axes)),
    )


def _memory_kind(site: MemorySite) -> str:
    """Returns the kind of device memory or host memory that a table is meant for.

    Raises:
        UserError: the devices at hand cannot reach such a memory.
    """
    kind, device = site.config.table.memory_kind, jax.local_devices()[0]
    if kind == "device":
        return device.default_memory().kind
    require(
        reaches(kind),
        f"model.memories.{site.group}.table.memory_kind",
        kind,
        f"must be 'device' here: {device.device_kind} has the memories {', '.join(_memories(device))}",
    )
    return kind


def reaches(memory_kind: str) -> bool:
    """Returns whether the devices at hand can reach a memory of this kind."""
    return memory_kind == "device" or memory_kind in _memories(jax.local_devices()[0])


def _memories(device: jax.Device) -> list[str]:
    return [memory.kind for memory in device.addressable_memories()]


def model_variables(state: TrainState) -> dict[str, ArrayTree]:
    """Returns the variables that `Transformer.apply` takes."""
    return {"params": state.params, "memory": state.tables, "buffers": state.buffers}
