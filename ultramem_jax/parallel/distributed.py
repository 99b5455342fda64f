"""Several processes that train one model: how they find each other, and what they agree on.

Each process is started with the same command and its number. They join before any of them looks at its
devices; from then on `jax.devices()` are those of all. Whatever is computed on a mesh of them, and every
function here that says so, all processes call in the same order. The first one, number 0, writes and speaks
for all.

A process that dies is missed when its heartbeats stop: the others then end with an error, instead of waiting
for it forever. For the same reason one that fails does not wait for the others (`end_at_once`).
"""

import contextlib
import json
import logging
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

log = logging.getLogger(__name__)

AUTO = "auto"
INITIALIZATION_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 60
"""Seconds. A machine that swaps, or a network that hiccups, is not taken for dead sooner."""

_WAIT_AT_THE_END_SECONDS = 24 * 3600
"""Those that are done wait for the first one, which draws and samples alone; and for it to prepare data."""
_PADDING = 1024
"""Of messages, so that a few compiled programs carry all of them."""


@dataclass(frozen=True)
class Membership(Checked):
    """The place of this process among those of a run."""

    PREFIX = "--"

    coordinator_address: str
    """HOST:PORT on the machine of process 0, free there; or `auto`: what the cluster's environment says."""
    num_processes: int | None = None
    process_id: int | None = None
    """From 0 to `num_processes` - 1. Both None with `auto`."""
    initialization_timeout: int = INITIALIZATION_TIMEOUT
    """Seconds to wait for the others."""
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT
    """Seconds without a sign of life after which a process counts as dead, and the others end."""

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
    """Makes this process one of those of a run. Before any use of a device.

    Raises:
        UserError: `auto` where no cluster is recognised, or nobody at the address. If others do not come,
            JAX ends the process itself.
    """
    # Else JAX would catch SIGTERM from here on, and only its own preemption service would hear of it.
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
    if host in ("127.0.0.1", "localhost"):  # no one else needs to come in
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
    """Until somebody listens at the address. JAX itself would abort, with a trace of C++."""
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
    """Whether this process has joined others. Asks no device."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def end_at_once(status: int) -> NoReturn:
    """Ends a process that failed. An orderly end would wait for others, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def any_process(flag: bool) -> bool:
    """Whether it is true in one of the processes. All call it."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def gather(value: Any) -> list[Any]:
    """The values of all processes, each something that JSON knows, in their order. All call it."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    data = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    # Blanks at the end mean nothing to JSON.
    padded = np.full(-(-longest // _PADDING) * _PADDING, ord(" "), np.uint8)
    padded[: len(data)] = data
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def from_first(value: Any) -> Any:
    """The first process's value, something that JSON knows. All call it."""
    return gather(value if is_first() else None)[0]


def look_in_first(look: Callable[[], Any]) -> Any:
    """Returns what `look` gives in the first process, something that JSON knows. All call it.

    Raises:
        UserError: in all processes, where `look` raises one.
        OSError: in all of several processes, with the words of anything else that `look` raises.
    """
    if jax.process_count() == 1:
        return look()
    found, failure = None, None
    if is_first():
        try:
            found = look()
        except Exception as error:  # the others wait for an answer, whatever it is
            failure = f"{type(error).__name__}: {error}"
    found, failure = from_first([found, failure])
    if failure is not None:
        of_user = failure.removeprefix(f"{UserError.__name__}: ")
        raise OSError(failure) if of_user == failure else UserError(of_user)
    return found


def require_same(what: dict[str, Any]) -> None:
    """Refuses processes that differ in what they are about to do. All call it.

    Args:
        what: by name, something that JSON knows.

    Raises:
        UserError: names the first thing that differs, and from which process on.
    """
    of_all = gather(what)
    for index, other in enumerate(of_all):
        for name, value in of_all[0].items():
            require(other[name] == value, name, value, f"is another one in process {index}")


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """Lets the first process do what is within, then the others. All call it."""
    if not is_joined():
        yield
        return
    # Not one of the collectives above: on CPUs these give up after half a minute.
    wait = ocp.multihost.get_barrier_sync_fn()
    if not is_first():
        wait(key="first_before_others", timeout_ms=_WAIT_AT_THE_END_SECONDS * 1000)
    yield
    if is_first():
        wait(key="first_before_others", timeout_ms=_WAIT_AT_THE_END_SECONDS * 1000)
