"""Runs one command in N processes of this machine, for `--processes=N`; they connect over a local port.

This process only watches over them:

- The first process writes to standard output and standard error as if it ran alone.
- The output of the other processes is shown only if they fail.
- SIGTERM and Ctrl-C are forwarded to all processes.
- If one process fails, all of them end soon, because the others cannot continue without it.
- No process outlives this one.
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
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import IO

from ultramem_jax.cli.arguments import take, take_integer
from ultramem_jax.errors import Stopped, UserError, require

_POLL_SECONDS = 0.2
_USER_ERROR = 2
_HERE = "127.0.0.1"
_LAST_LINES = 40
"""Lines that are shown of the output of a failed process.

The first process is excepted: its output was shown while it ran.
"""


def take_processes(argv: list[str]) -> tuple[int, list[str]]:
    """Returns the value of `--processes`, 1 if it is absent, and the command line without that flag.

    Raises:
        UserError: 0 processes, or flags that join processes which something else starts.
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
    """Returns the flags of one of several processes as the flags of a command that starts all of them.

    The result names no machine: the address of the coordinator is left out.
    """
    address, rest = take(flags, "coordinator_address")
    if address is None:
        return flags
    processes, rest = take(rest, "num_processes")
    rest = take(rest, "process_id")[1]
    return rest if processes is None else [f"--processes={processes}", *rest]


def run(command: list[str], processes: int, grace_seconds: float = 5.0) -> int:
    """Runs the command in several processes, each with flags that say which one it is.

    Args:
        command: the command and its flags.
        processes: number of processes.
        grace_seconds: time that processes have to print their messages after another failed, or after Ctrl-C.

    Returns:
        0 if all ended well, `Stopped.STATUS` if SIGTERM stopped them, else the status of the process that
        failed first. If signal n ended that process, its status is 128 + n, as in a shell.
    """
    with _forwarded_signals() as forwarded, contextlib.ExitStack() as stack:
        job = _Job(command, processes, stack)
        forwarded.to = job.send
        status = job.watch(forwarded, grace_seconds)
    return 128 + signal.SIGINT if signal.SIGINT in forwarded.seen else status


class _Forwarded:
    """Records the signals that arrived, and passes them to the processes."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.to: Callable[[int], None] = lambda number: None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # A user who presses Ctrl-C twice does not want to wait.
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
    """Holds the processes from the start of the first to the end of the last."""

    def __init__(self, command: list[str], processes: int, stack: contextlib.ExitStack):
        """Starts the processes; `stack` kills those that still run when it closes, and closes their files."""
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
                    # In a session of its own, so that Ctrl-C reaches it only through this process.
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            )
        # Threads start after all processes: forking a process that has threads is unsafe.
        for index in range(processes):
            self._start_thread(self._wait_for, index)
        self._start_thread(self._pass_on_output)

    def send(self, number: int) -> None:
        """Sends a signal to all processes that still run."""
        for member in self._members:
            if member.poll() is None:
                member.send_signal(number)

    def watch(self, forwarded: _Forwarded, grace_seconds: float) -> int:
        """Waits until all processes have ended, and returns the status of the job.

        Returns:
            The status of the first process that failed; 0 or `Stopped.STATUS` if none failed.
        """
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
                deadline = time.monotonic() + grace_seconds
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
            return  # all processes reject the same input, and the first one has reported it
        if index:
            self._said[index].seek(0)
            print("".join(self._said[index].readlines()[-_LAST_LINES:]), end="", file=sys.stderr)
        how = f"ended with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
        what = f"process {index} of {len(self._members)} {how}"
        if self._members[0].returncode < 0:
            print(file=sys.stderr)  # ends the line of its unfinished progress bar
        print(f"error: {what}: the others cannot go on without it", file=sys.stderr)

    def _start_thread(self, function: Callable[..., None], *arguments: int) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _wait_for(self, index: int) -> None:
        self._ended.put((index, self._members[index].wait()))

    def _pass_on_output(self) -> None:
        output = self._members[0].stdout
        assert output is not None
        with output:
            for line in _without_connections(output):
                sys.stdout.write(line)
                sys.stdout.flush()

    def _end_all(self) -> None:
        self.send(signal.SIGKILL)
        for member in self._members:
            member.wait()


def _without_connections(lines: Iterable[str]) -> Iterator[str]:
    """Yields lines but for those of Gloo, which connects processes on CPUs and prints one per connection.

    Its threads print in pieces. So two messages may share a line, and the number at the end of one follows on
    a line of its own.
    """
    unfinished = 0
    for line in lines:
        unfinished += line.count("[Gloo]")
        is_end = unfinished > 0 and line.strip(" 0123456789\n") == ""
        if "[Gloo]" in line or "peer ranks" in line or is_end:
            unfinished = max(unfinished - 1, 0)
        else:
            yield line


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HERE, 0))
        return probe.getsockname()[1]


def _die_with_parent() -> Callable[[], None] | None:
    """Returns a function with which a new process asks Linux to kill it when this process ends.

    Returns None on other systems.
    """
    if sys.platform != "linux":
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, int(signal.SIGKILL))
