"""Converts the authors' PyTorch weights: state dicts to a module and its variables, and back.

    module, variables = load("memory.safetensors", hyper)
    y = module.apply(variables, x)
    write_safetensors("again.safetensors", dump(variables, hyper))

Four layers are known: `v1` (UltraMem), `v2` (UltraMemV2 layers over one table), `memory_plus` (Memory+ layers
over one table), and `engram`, the layer of Engram's released demo. The module of `engram` also takes the ids
of the tokens: `module.apply(variables, x, token_ids)`. `Reference.of` and `EngramReference.of` list the
hyper-parameters that `hyper` must hold, under the authors' names.

The authors' code reads the leading singular vectors of the Tucker core from buffers. Here the layer computes
them from the core, and takes their sign from the buffers. The results are the same if the buffers belong to
the core.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.config.memory import MemorySite
from ultramem_jax.errors import UserError, require
from ultramem_jax.interop.constant import Constant
from ultramem_jax.interop.engram import MODULE, EngramReference
from ultramem_jax.interop.entries import Entry, check_index, compare_names
from ultramem_jax.interop.hyper import Reference
from ultramem_jax.interop.hyper_values import Hyper
from ultramem_jax.interop.names import TABLES, entries
from ultramem_jax.interop.safetensors_files import read_safetensors, write_safetensors
from ultramem_jax.layers.memory.memory import Memory, SharedTables
from ultramem_jax.nested import leaves
from ultramem_jax.tree_types import Variables

__all__ = [
    "Constant",
    "EngramModule",
    "ReferenceModule",
    "dump",
    "load",
    "read_safetensors",
    "write_safetensors",
]

Loaded: TypeAlias = dict[str, dict[str, dict[str, jax.Array | Constant]]]
"""Variables of a module: collection -> module -> name -> array."""
_LOSSES = "losses"
_LAYERS = "the layers do"


class _EngramLayer(nn.Module):
    """Applies the layer under the name that its variables have."""

    site: MemorySite

    @nn.compact
    def __call__(self, x: jax.Array, token_ids: jax.Array) -> jax.Array:
        """Returns the output (B, S, D) for x of the same shape."""
        return Memory(self.site, name=MODULE)(x, train=False, token_ids=token_ids)


class _Layers(nn.Module):
    """Applies layer i to x[i], with all layers over the same tables."""

    reference: Reference

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the outputs (layers, B, S, D) for x of the same shape."""
        reference = self.reference
        tables = SharedTables(reference.sites[0], name=TABLES)()
        outputs = []
        for index, site in enumerate(reference.sites[: reference.num_layers]):
            layer = Memory(site, name=site.name)
            outputs.append(layer(x[index], train=False, tables=tables))
        return jnp.stack(outputs)


class EngramModule:
    """Applies a loaded Engram layer. Its `apply` works like that of a Flax module."""

    def __init__(self, reference: EngramReference):
        self.reference = reference
        self._layer = _EngramLayer(reference.site)

    def apply(
        self,
        variables: Variables,
        x: jax.Array,
        token_ids: jax.Array,
        *,
        mutable: bool | str | Sequence[str] = False,
    ) -> Any:
        """Applies the layer.

        Args:
            variables: the result of `load`, or a tree of the same structure.
            x: (B, S, D), the residual stream before attention.
            token_ids: (B, S) integers in [0, V), before they are mapped to canonical ids.
            mutable: the collections to return beside the output, as for a Flax module. `reads` holds under
                `memory_0` the `slots` (T, R), rows of the joint table.

        Returns:
            The term to add to the residual stream, (B, S, D) float32; with `mutable` also a dict of the
            collections.

        Raises:
            UserError: x or token_ids has another shape, or an id is out of range.
        """
        size, shape = self.reference.embed_dim, np.shape(x)
        require(len(shape) == 3 and shape[2] == size, "x.shape", shape, f"must be (B, S, D) with D = {size}")
        of_ids, vocab = np.shape(token_ids), self.reference.site.context.vocab_size
        require(of_ids == shape[:2], "token_ids.shape", of_ids, f"must be that of x's tokens, {shape[:2]}")
        if not isinstance(token_ids, jax.core.Tracer):
            given = np.asarray(token_ids)
            whole = np.issubdtype(given.dtype, np.integer)
            require(whole, "token_ids.dtype", given.dtype.name, "must be one of integers")
            if given.size:
                inside = given.min() >= 0 and given.max() < vocab
                limits = (given.min(), given.max())
                require(bool(inside), "token_ids", limits, f"its range must be within [0, {vocab})")
        ids = jnp.asarray(token_ids).astype(jnp.int32)
        return self._layer.apply(variables, jnp.asarray(x, jnp.float32), ids, mutable=mutable)


class ReferenceModule:
    """Applies loaded layers. Its `apply` works like that of a Flax module, with the authors' gradients.

    In the authors' code the balance loss is not a part of what is minimised. Instead a hook on the layer's
    output adds its gradient, whatever the cotangent of the output is. `apply` does the same. So a loss that
    is made of its output must not add the sown `losses` once more.
    """

    def __init__(self, reference: Reference):
        self.reference = reference
        self._layers = _Layers(reference)

    def apply(
        self, variables: Variables, x: jax.Array, *, mutable: bool | str | Sequence[str] = False
    ) -> Any:
        """Applies the layers.

        Args:
            variables: the result of `load`, or a tree of the same structure.
            x: (B, S, D) for `v1`; (layers, B, S, D) for the others, with layer i applied to x[i].
            mutable: the collections to return beside the output, as for a Flax module: `reads` holds what was
                read, `losses` the balance loss, `buffers` the updated singular vectors. Each has one
                `memory_{i}` for every layer.

        Returns:
            The output, float32 and of the shape of x; with `mutable` also a dict of the collections.

        Raises:
            UserError: x has another shape.
        """
        reference = self.reference
        axes = "(layers, B, S, D)" if reference.stacked else "(B, S, D)"
        fits = x.ndim == 3 + reference.stacked and x.shape[-1] == reference.embed_dim
        fits = fits and (not reference.stacked or x.shape[0] == reference.num_layers)
        sizes = f"layers = {reference.num_layers}, D = {reference.embed_dim}"
        require(fits, "x.shape", x.shape, f"must be {axes} with {sizes}")
        x = x.astype(jnp.float32)
        asked = [mutable] if isinstance(mutable, str) else mutable
        # `losses` is always mutable, because only then does the layer sow its loss.
        opened = True if asked is True else [*(asked or ()), _LOSSES]
        y, sown = self._layers.apply(variables, x if reference.stacked else x[None], mutable=opened)
        y = y if reference.stacked else y[0]
        balance = [layer["balance"] for layer in sown.get(_LOSSES, {}).values()]
        if balance:
            y = _with_gradient_of(y, sum(balance[1:], balance[0]))
        if asked is False:
            return y
        wanted = set(sown) if asked is True else set(asked)
        return y, {name: collection for name, collection in sown.items() if name in wanted}


def load(
    state: Mapping[str, object] | str | os.PathLike[str],
    hyper: Hyper,
    *,
    allow_nonfinite: bool = False,
) -> tuple[ReferenceModule | EngramModule, Loaded]:
    """Makes the module and the variables from a state dict of the authors' code.

    Args:
        state: arrays by name, or the path of a `.safetensors` file. Floats of any width become float32.
        hyper: the hyper-parameters, see `Reference.of`.
        allow_nonfinite: accepts weights that are NaN or infinite, for example to examine a run that diverged.

    Returns:
        The module, a `ReferenceModule` or `EngramModule`, and its variables: `params`, `memory` (the tables)
        and `buffers`. All leaves are float32, so that `jax.grad` takes the whole tree. Permutations and maps
        of tokens are a `Constant`.

    Raises:
        UserError: an entry is missing, extra, misshapen or no array of floats; it is not finite, or not in
            float32; a shuffled address is out of range; a hyper-parameter or the file is not as it must be.
    """
    if isinstance(state, str | os.PathLike):
        state = read_safetensors(state)
    _require_mapping("state", state, "a dict of arrays by name, or the path of a .safetensors file")
    reference, expected = _of(hyper)
    compare_names(state, [name for entry in expected for name in entry.names], "the state dict", _LAYERS)
    variables: Loaded = {}
    for entry in expected:
        arrays = [_checked(name, state[name], entry, allow_nonfinite) for name in entry.names]
        value = Constant(arrays[0]) if entry.constant else jnp.asarray(entry.pack(arrays))
        collection, module, name = entry.path
        variables.setdefault(collection, {}).setdefault(module, {})[name] = value
    if isinstance(reference, EngramReference):
        return EngramModule(reference), variables
    return ReferenceModule(reference), variables


def dump(variables: Variables, hyper: Hyper) -> dict[str, np.ndarray]:
    """Returns the authors' state dict for variables of `load`, or for a tree of gradients by them.

    Args:
        variables: with the collections `params`, `memory` and, except for Memory+, `buffers`. Other
            collections are ignored.
        hyper: the hyper-parameters that they were loaded with.

    Returns:
        NumPy arrays by name, in the dtypes of the variables; permutations in the dtype that was loaded. NaN
        and infinities are kept.

    Raises:
        UserError: a variable is missing, extra or misshapen, or a hyper-parameter is not as it must be.
    """
    _, expected = _of(hyper)
    _require_mapping("variables", variables, "a dict of collections, as of load")
    collections = {entry.path[0] for entry in expected}
    given = {
        "/".join(map(str, path)): value
        for path, value in leaves({name: variables.get(name, {}) for name in collections})
    }
    compare_names(given, ["/".join(entry.path) for entry in expected], "the tree of variables", _LAYERS)
    state: dict[str, np.ndarray] = {}
    for entry in expected:
        path = "/".join(entry.path)
        variable = _array(path, given[path])
        shape = entry.variable_shape
        require(variable.shape == shape, f"{path}.shape", variable.shape, f"must be {shape}")
        kind, allowed = (
            (jnp.integer, "must be one of integers")
            if entry.constant
            else (jnp.floating, "must be floats: see ops.rows.from_stored")
        )
        require(jnp.issubdtype(variable.dtype, kind), f"{path}.dtype", variable.dtype.name, allowed)
        state |= zip(entry.names, entry.unpack(variable), strict=True)
    return state


def _of(hyper: Hyper) -> tuple[Reference | EngramReference, list[Entry]]:
    """Returns the layers of the hyper-parameters, and which entry of their state dict is which variable."""
    if isinstance(hyper, Mapping) and hyper.get("layer") == "engram":
        engram = EngramReference.of(hyper)
        return engram, engram.entries()
    reference = Reference.of(hyper)
    return reference, entries(reference)


@jax.custom_vjp
def _with_gradient_of(y: jax.Array, loss: jax.Array) -> jax.Array:
    """Returns `y` itself. The backward pass adds the gradient of `loss`, whatever the cotangent of `y`."""
    del loss
    return y


def _hook_forward(y: jax.Array, loss: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, jnp.ones_like(loss)


def _hook_backward(ones: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent, ones


_with_gradient_of.defvjp(_hook_forward, _hook_backward)


def _require_mapping(field: str, value: object, allowed: str) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{field}: must be {allowed}, not a {type(value).__name__}")


def _array(name: str, value: object) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name}: must be an array of numbers, not a {type(value).__name__}") from None


def _checked(name: str, value: object, entry: Entry, allow_nonfinite: bool) -> np.ndarray:
    """Returns the array under `name`, as float32 unless the entry is a constant."""
    array = _array(name, value)
    require(array.shape == entry.shape, f"{name}.shape", array.shape, f"must be {entry.shape}")
    if entry.constant:
        whole = np.issubdtype(array.dtype, np.integer)
        require(whole, f"{name}.dtype", array.dtype.name, "must be one of integers")
        if entry.index:
            check_index(array, entry.limit, name)
        return array
    # NumPy would convert other dtypes too: it drops imaginary parts, parses strings and counts booleans.
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name}: must be an array of numbers of a float dtype, not {array.dtype.name!r}")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    finite = np.isfinite(numbers)
    if not finite.all():
        lost = array[np.isfinite(array) & ~finite]
        require(lost.size == 0, name, lost[:1].tolist(), "must be numbers that float32 can hold")
        bad = numbers[~finite]
        allowed = f"must be finite, {bad.size:,} of {numbers.size:,} are not; allow_nonfinite=True takes them"
        require(allow_nonfinite, name, bad[:1].tolist(), allowed)
    return numbers
