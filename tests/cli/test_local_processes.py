"""One command in several processes: what is shown of them, and how they end."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ultramem_jax.cli import local_processes

ROOT = pathlib.Path(__file__).parents[2]

SUPERVISOR = """
    import sys
    from ultramem_jax.cli import local_processes
    sys.exit(local_processes.run([sys.executable, "-c", sys.argv[1]], 2, grace_seconds=1))
"""
MEMBER = """
    import os, signal, sys, time
    flags = dict(flag.lstrip("-").split("=") for flag in sys.argv[1:])
    me = int(flags["process_id"])
    def say(*words):
        print(*words, flush=True)
"""


def start(body):
    """The supervisor, with two processes that run `body`; its `me` is 0 or 1."""
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(SUPERVISOR),
        textwrap.dedent(MEMBER) + textwrap.dedent(body),
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes)


def test_the_first_one_speaks_for_all():
    process = start(
        """
        say("result of", me, flags["num_processes"], flags["coordinator_address"].split(":")[0])
        say("[Gloo] Rank 0 is connected to 1 peer ranks.")
        print("warning of", me, file=sys.stderr)
        """
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "result of 0 2 127.0.0.1\n", "warning of 0\n")


@pytest.mark.parametrize(
    "of_gloo",
    [
        "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n",
        "[Gloo] Rank 0[Gloo] Rank 0 is connected to 1 peer ranks. is connected to 1 peer ranks. : 1\n1\n",
        "[Gloo] Rank 0 is connected to [Gloo] Rank 01 peer ranks. : 11\n\n",
        "[Gloo] Rank 0 is connected to 1\n peer ranks. : 1\n",
    ],
    ids=["whole", "two on a line", "a line of nothing left", "one on two lines"],
)
def test_connections_are_not_passed_on_even_if_their_lines_are_torn(of_gloo):
    lines = [*of_gloo.splitlines(keepends=True), "validation: 2.1\n", "7\n", "\n"]
    assert list(local_processes._without_connections(lines)) == ["validation: 2.1\n", "7\n", "\n"]


@pytest.mark.parametrize(
    "ending, status, how",
    [
        ("sys.exit(3)", 3, "ended with status 3"),
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL"),
        ("sys.exit('what went wrong')", 1, "ended with status 1"),
    ],
)
def test_if_one_fails_all_end_and_it_is_said_which(ending, status, how):
    process = start(f"if me: {ending}\ntime.sleep(600)")
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and time.monotonic() - began < 30
    assert err.splitlines()[-1] == f"error: process 1 of 2 {how}: the others cannot go on without it"
    assert ("what went wrong" in err) == ("wrong" in ending)


def test_those_that_were_stopped_have_not_failed():
    process = start("say('stopped')\nsys.exit(75)")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "stopped\n", "")


def test_bad_input_is_said_once():
    process = start("print('error: x = 1', file=sys.stderr)\nsys.exit(2)")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "error: x = 1\n")


def test_sigterm_reaches_all_and_is_waited_for():
    process = start(
        """
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5 * me), say("saved"), sys.exit(0)))
        say("ready")
        time.sleep(600)
        """
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)  # the other one says nothing; were it not ready, it would end with an error
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out == "saved\n" and process.returncode in (0, 128 + signal.SIGTERM), err


def test_ctrl_c_ends_even_those_that_do_not_listen():
    process = start("signal.signal(signal.SIGINT, signal.SIG_IGN)\nsay('ready')\ntime.sleep(600)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_none_outlives_the_supervisor():
    process = start("say(os.getpid())\ntime.sleep(600)")
    member = pathlib.Path(f"/proc/{process.stdout.readline().strip()}/stat")
    assert member.exists()
    process.kill()
    process.communicate(timeout=60)
    give_up = time.monotonic() + 60
    while member.exists() and member.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < give_up
        time.sleep(0.02)
