"""Connects the processes that train one model, and lets them agree.

Each process is started with the same command and its number. They join before any of them uses its devices;
from then on `jax.devices()` lists the devices of all. All processes must call computations on a mesh of these
devices in the same order, and also every function here that says so. The first process, number 0, writes
files and logs for all.

If a process dies, its heartbeats stop, and the others end with an error instead of waiting for it forever.
For the same reason a process that fails does not wait for the others (`end_at_once`).
"""

import contextlib
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ultramem_jax.config.field_types import Checked
from ultramem_jax.errors import UserError, require, whole_number
from ultramem_jax.tree_types import JsonDict

log = logging.getLogger(__name__)

AUTO = "auto"
"""Coordinator address that stands for what the cluster's environment says."""
INITIALIZATION_TIMEOUT = 300
"""Seconds to wait for the other processes, by default."""
HEARTBEAT_TIMEOUT = 60
"""Seconds until a silent process counts as dead, by default: long enough for a swapping machine or a short
network failure."""

_WAIT_AT_THE_END_SECONDS = 24 * 3600
"""Longest wait for the first process, in seconds: only it draws figures, samples text and prepares data."""
_PADDING = 1024
"""Messages are padded to a multiple of so many bytes, so that a few compiled programs carry all of them."""


@dataclass(frozen=True)
class Membership(Checked):
    """Describes this process's membership in a run of several processes."""

    PREFIX = "--"

    coordinator_address: str
    """HOST:PORT, a free port on the machine of process 0; or `auto`, what the cluster's environment says."""
    num_processes: int | None = None
    """Number of processes of the run; None with `auto`."""
    process_id: int | None = None
    """Number of this process, from 0 to `num_processes` - 1; None with `auto`."""
    initialization_timeout: int = INITIALIZATION_TIMEOUT
    """Seconds to wait for the other processes."""
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT
    """Seconds without a heartbeat after which a process counts as dead, and the others end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("initialization_timeout", "heartbeat_timeout"):
            require(getattr(self, name) >= 1, f"--{name}", getattr(self, name), "must be at least 1 second")
        given = {"num_processes": self.num_processes, "process_id": self.process_id}
        address = self.coordinator_address
        if address == AUTO:
            for name, value in given.items():
                require(value is None, f"--{name}", value, "is not given with --coordinator_address=auto")
            return
        host, colon, port = address.rpartition(":")
        right = bool(host and colon) and 0 < (whole_number(port) or 0) < 2**16
        require(right, "--coordinator_address", address, f"must be HOST:PORT, or {AUTO!r}")
        for name, value in given.items():
            if value is None:
                raise UserError(f"--{name}: must be given with --coordinator_address = {address!r}")
        assert self.num_processes is not None and self.process_id is not None
        require(self.num_processes >= 1, "--num_processes", self.num_processes, "must be at least 1")
        require(
            0 <= self.process_id < self.num_processes,
            "--process_id",
            self.process_id,
            f"must be in [0, {self.num_processes}), below --num_processes",
        )


def join(member: Membership) -> None:
    """Joins this process to a run; it must be called before any use of a device.

    If other processes do not come, JAX ends this process itself.

    Raises:
        UserError: the address is `auto` but no cluster is recognised, or nobody answers at the address.
    """
    # Otherwise JAX would catch SIGTERM from here on, and only its own preemption service would get it.
    jax.config.update("jax_enable_preemption_service", False)
    how: dict[str, Any] = {
        "initialization_timeout": member.initialization_timeout,
        "heartbeat_timeout_seconds": member.heartbeat_timeout,
        "shutdown_timeout_seconds": _WAIT_AT_THE_END_SECONDS,
    }
    if member.coordinator_address == AUTO:
        try:
            jax.distributed.initialize(**how)
        except ValueError as error:
            raise UserError(
                f"--coordinator_address = {AUTO!r}: no cluster is recognised here ({error}); give HOST:PORT, "
                "--num_processes and --process_id"
            ) from error
        return
    host = member.coordinator_address.rpartition(":")[0]
    if host in ("127.0.0.1", "localhost"):  # no other machine needs to connect
        how["coordinator_bind_address"] = member.coordinator_address
    if member.process_id:
        _wait_for_coordinator(member)
    else:
        log.info("waiting for %d processes at %s", member.num_processes, member.coordinator_address)
    try:
        jax.distributed.initialize(
            member.coordinator_address,
            member.num_processes,
            member.process_id,
            cluster_detection_method="deactivate",
            **how,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--coordinator_address = {member.coordinator_address!r}: cannot be used: {error}"
        ) from error


def _wait_for_coordinator(member: Membership) -> None:
    """Waits until process 0 listens at the address, because JAX itself would abort with a C++ trace.

    Raises:
        UserError: process 0 does not answer within the initialization timeout.
    """
    host, _, port = member.coordinator_address.rpartition(":")
    give_up = time.monotonic() + member.initialization_timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > give_up:
                raise UserError(
                    f"--coordinator_address = {member.coordinator_address!r}: process 0 does not answer "
                    f"there within {member.initialization_timeout} s ({error})"
                ) from error
        time.sleep(0.1)


def is_joined() -> bool:
    """Tells whether this process has joined others; does not initialise devices."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Tells whether this process is the first, which writes files and logs for all."""
    return jax.process_index() == 0


def end_at_once(status: int) -> NoReturn:
    """Ends a process that failed, at once: an orderly end would wait for others, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class PeriodicQuestion:
    """Asks about every two seconds, in a loop of steps, whether a flag is True in any process.

    All processes ask at the same steps, which follow from the speed of the first process. A process by itself
    is asked in every step.
    """

    def __init__(self, seconds: float = 2.0):
        """Prepares to ask.

        Args:
            seconds: about the time between two questions.
        """
        self._seconds, self._next, self._pause = seconds, 0, 1
        self._seconds_per_step = math.nan

    def __call__(self, flag: bool, step: int, seconds_per_step: float) -> bool:
        """Returns whether the flag was True in any process, if it is time to ask; all processes must call it.

        Args:
            flag: this process's flag, which stays True once it is.
            step: number of the step, the same in all processes.
            seconds_per_step: speed of this process; NaN if it is not known yet.
        """
        if jax.process_count() == 1:
            self._seconds_per_step = seconds_per_step
            return flag
        if step < self._next:
            return False
        answers = multihost_utils.process_allgather(np.asarray([flag, seconds_per_step], np.float32))
        self._seconds_per_step = float(answers[0, 1])
        wanted = self._seconds / max(self._seconds_per_step, 1e-3)
        # A speed that is measured wrongly once does not silence the question for long.
        self._pause = 1 if math.isnan(wanted) else max(1, min(int(wanted), 2 * self._pause))
        self._next = step + self._pause
        return bool(answers[:, 0].any())

    @property
    def seconds_per_step(self) -> float:
        """Returns the first process's speed at the last question, the same in all processes; NaN before."""
        return self._seconds_per_step


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; all processes must call it.

    Args:
        value: anything that JSON can represent.
    """
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    # JSON ignores the blanks at the end.
    padded = np.full(-(-longest // _PADDING) * _PADDING, ord(" "), np.uint8)
    padded[: len(data)] = data
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def from_first(value: Any) -> Any:
    """Returns the first process's value; all processes must call it.

    Args:
        value: anything that JSON can represent.
    """
    return gather(value if is_first() else None)[0]


def look_in_first(look: Callable[[], Any]) -> Any:
    """Returns what `look` returns in the first process; all processes must call it.

    Args:
        look: returns anything that JSON can represent. Only the first process calls it.

    Raises:
        UserError: in all processes, if `look` raises one.
        OSError: in all of several processes, with the message of any other error that `look` raises.
    """
    if jax.process_count() == 1:
        return look()
    found, failure = None, None
    if is_first():
        try:
            found = look()
        except Exception as error:  # any error is an answer, for which the others wait
            failure = f"{type(error).__name__}: {error}"
    found, failure = from_first([found, failure])
    if failure is not None:
        of_user = failure.removeprefix(f"{UserError.__name__}: ")
        raise OSError(failure) if of_user == failure else UserError(of_user)
    return found


def require_same(what: JsonDict) -> None:
    """Refuses processes that differ in what they are about to do; all processes must call it.

    Args:
        what: values that must be equal, by name; anything that JSON can represent.

    Raises:
        UserError: values differ. The message names the first one, and the first process that differs.
    """
    of_all = gather(what)
    for index, other in enumerate(of_all):
        for name, value in of_all[0].items():
            require(other[name] == value, name, value, f"is another one in process {index}")


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Lets the first process run the block first, then the others; all processes must call it."""
    if not is_joined():
        yield
        return
    # The collectives above would not do: on CPU they give up after half a minute.
    wait = ocp.multihost.get_barrier_sync_fn()
    if not is_first():
        wait(key="first_before_others", timeout_ms=_WAIT_AT_THE_END_SECONDS * 1000)
    yield
    if is_first():
        wait(key="first_before_others", timeout_ms=_WAIT_AT_THE_END_SECONDS * 1000)
