"""Says in one line that a model exceeds device memory, and checks this for its state before drawing it.

Without this check, a state that is too large fails in the middle of a compilation, is killed by the system,
or waits forever for memory that will not come.
"""

import contextlib
import math
from collections.abc import Iterator

import jax

from ultramem_jax.errors import UserError
from ultramem_jax.reporting.environment import host_memory_bytes
from ultramem_jax.tree_types import ArrayTree


def require_room(abstract: ArrayTree, num_parameters: int) -> None:
    """Refuses a state that is larger than the memory of this process's devices.

    Args:
        abstract: the result of `abstract_state`: shapes, dtypes and shardings.
        num_parameters: number of parameters, for the message.

    Raises:
        UserError: the state is too large; the message gives both sizes.
    """
    wanted = sum(_bytes_here(leaf) for leaf in jax.tree.leaves(abstract))
    there_is = _memory_bytes()
    if there_is is not None and wanted > there_is:
        raise _not_enough(num_parameters, f"{wanted / 1e9:,.1f} GB, and there are {there_is / 1e9:,.1f}")


@contextlib.contextmanager
def running_out_in_a_line(num_parameters: int) -> Iterator[None]:
    """Turns the error of a device that has no memory left into one line.

    Args:
        num_parameters: number of the model's parameters, for the message.

    Raises:
        UserError: in place of JAX's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "memory" not in str(error).lower():
            raise
        raise _not_enough(num_parameters, "the device says so") from error


def _not_enough(num_parameters: int, why: str) -> UserError:
    return UserError(
        f"not enough memory for {num_parameters:,} parameters, their moments and a step ({why}): lower "
        "the slots of memories or train.batch_size, raise train.grad_accumulation, or choose a smaller model"
    )


def _bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array on all devices of this process; 0 where it lies in their other memory."""
    sharding = leaf.sharding
    assert sharding is not None
    device = jax.local_devices()[0]
    if device.platform != "cpu" and sharding.memory_kind not in (None, device.default_memory().kind):
        return 0
    of_a_device = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return of_a_device * len(sharding.addressable_devices)


def _memory_bytes() -> int | None:
    """Returns the memory of all devices of this process, in bytes.

    On CPUs it is host memory; None if unknown.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return host_memory_bytes() or None
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return sum(limits) if all(limits) else None
