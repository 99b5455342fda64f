"""`--processes=N`: one command in N processes of this machine, joined over a port of its own.

This process only watches over them. The first one writes to its standard output and error as if it ran alone.
Of the others nothing is shown unless they fail. SIGTERM and Ctrl-C go to all; if one fails, all end soon; and
none outlives this process.
"""

import contextlib
import ctypes
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from ultramem_jax.cli.arguments import take, take_integer
from ultramem_jax.errors import Stopped, UserError, require

_GRACE_SECONDS = 5.0
"""After one failed, the others cannot go on. They have this long to say what they have to say."""
_POLL_SECONDS = 0.2
_USER_ERROR = 2
_HERE = "127.0.0.1"
_LAST_LINES = 40
"""Of what a process said that failed, and is not the first one, whose words were seen."""


def take_processes(argv: list[str]) -> tuple[int, list[str]]:
    """The value of `--processes`, 1 if it was not given, and the rest of the command line.

    Raises:
        UserError: none, or flags that join processes which somebody else starts.
    """
    processes, rest = take_integer(argv, "processes")
    if processes is None:
        return 1, rest
    require(processes >= 1, "--processes", processes, "must be at least 1")
    for flag in ("coordinator_address", "num_processes", "process_id"):
        if take(rest, flag)[0] is not None:
            raise UserError(f"--processes = {processes}: starts processes itself, and --{flag} joins others")
    return processes, rest


def as_given(flags: list[str]) -> list[str]:
    """The flags of one of several processes as a command for all of them, which names no machine."""
    address, rest = take(flags, "coordinator_address")
    if address is None:
        return flags
    processes, rest = take(rest, "num_processes")
    rest = take(rest, "process_id")[1]
    return rest if processes is None else [f"--processes={processes}", *rest]


def run(command: list[str], processes: int) -> int:
    """Runs the command in so many processes, each with flags that say which one it is.

    Returns:
        0 if all ended well, `Stopped.STATUS` if SIGTERM stopped them, else the status of the one that failed
        first: 128 + n if signal n ended it, as shells have it.
    """
    with _forwarded_signals() as forwarded, contextlib.ExitStack() as stack:
        job = _Job(command, processes, stack)
        forwarded.to = job.send
        status = job.watch(forwarded)
    return 128 + signal.SIGINT if signal.SIGINT in forwarded.seen else status


class _Forwarded:
    """Signals that came, and where they go."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.to: Callable[[int], None] = lambda number: None

    def __call__(self, number: int, frame: Any) -> None:
        # Whoever presses Ctrl-C twice does not want to wait.
        again = number == signal.SIGINT and number in self.seen
        self.seen.append(number)
        self.to(signal.SIGKILL if again else number)


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[_Forwarded]:
    forwarded = _Forwarded()
    before = {number: signal.signal(number, forwarded) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """The processes, from their start to the end of the last one."""

    def __init__(self, command: list[str], processes: int, stack: contextlib.ExitStack):
        """Starts them; `stack` kills what is left of them, and closes their files."""
        address = f"{_HERE}:{_free_port()}"
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._said: list[IO[str]] = []
        self._members: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        stack.callback(self._end_all)
        die_with_parent = _die_with_parent()
        for index in range(processes):
            flags = [f"--coordinator_address={address}", f"--num_processes={processes}"]
            said = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
            self._said.append(said)
            self._members.append(
                subprocess.Popen(
                    [*command, *flags, f"--process_id={index}"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if index else subprocess.PIPE,
                    stderr=said if index else None,
                    text=True,
                    errors="replace",
                    # A session of their own: a Ctrl-C of the terminal comes by way of this process alone.
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            )
        # Not before all are started: a thread and a fork do not go together.
        for index in range(processes):
            self._start_thread(self._wait_for, index)
        self._start_thread(self._pass_on_output)

    def send(self, number: int) -> None:
        """Sends a signal to all that run."""
        for member in self._members:
            if member.poll() is None:
                member.send_signal(number)

    def watch(self, forwarded: _Forwarded) -> int:
        """Waits for all; returns the status of the first that failed, else 0 or that of `Stopped`."""
        failed: tuple[int, int] | None = None
        stopped = False
        deadline, running = None, len(self._members)
        while running:
            with contextlib.suppress(queue.Empty):
                index, status = self._ended.get(timeout=_POLL_SECONDS)
                running -= 1
                stopped |= status == Stopped.STATUS
                if status not in (0, Stopped.STATUS) and failed is None:
                    failed = (index, status)
            if deadline is None and (failed or signal.SIGINT in forwarded.seen):
                deadline = time.monotonic() + _GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
        for thread in self._threads:
            thread.join()
        if failed is None:
            return Stopped.STATUS if stopped else 0
        if signal.SIGINT not in forwarded.seen:
            self._report(*failed)
        return failed[1] if failed[1] > 0 else 128 - failed[1]

    def _report(self, index: int, status: int) -> None:
        if status == self._members[0].returncode == _USER_ERROR:
            return  # bad input is bad in all processes, and the first one has said so
        if index:
            self._said[index].seek(0)
            print("".join(self._said[index].readlines()[-_LAST_LINES:]), end="", file=sys.stderr)
        how = f"ended with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
        what = f"process {index} of {len(self._members)} {how}"
        if self._members[0].returncode < 0:
            print(file=sys.stderr)  # where its progress bar broke off
        print(f"error: {what}: the others cannot go on without it", file=sys.stderr)

    def _start_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _wait_for(self, index: int) -> None:
        self._ended.put((index, self._members[index].wait()))

    def _pass_on_output(self) -> None:
        output = self._members[0].stdout
        assert output is not None
        with output:
            for line in output:
                # Gloo, which connects processes on CPUs, reports every connection there.
                if "[Gloo]" not in line and "peer ranks" not in line:
                    sys.stdout.write(line)
                    sys.stdout.flush()

    def _end_all(self) -> None:
        self.send(signal.SIGKILL)
        for member in self._members:
            member.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HERE, 0))
        return probe.getsockname()[1]


def _die_with_parent() -> Callable[[], None] | None:
    """For a new process to call: Linux kills it when this one ends, however that happens."""
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, int(signal.SIGKILL))
