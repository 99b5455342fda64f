"""Logs on the command line: what is shown, and where."""

import logging
import sys

import pytest
from absl import logging as absl_logging
from tqdm import tqdm

from ultramem_jax.cli.plain_log import plain_log

ORBAX = "/lib/orbax/checkpoint/checkpoint_manager.py"


def _log(name, level, message, path="/lib/elsewhere.py", failed=False):
    try:
        raise ValueError("disk full")
    except ValueError:
        exc_info = sys.exc_info() if failed else None
    logger = logging.getLogger(name)
    record = logger.makeRecord(name, level, path, 1, message, (), exc_info)
    logger.handle(record)


@pytest.mark.parametrize(
    "shown, record",
    [
        (True, dict(name="ultramem_jax.training", level=logging.INFO, message="resumed from step 3")),
        (True, dict(name="absl", level=logging.WARNING, message="a warning of Orbax", path=ORBAX)),
        (True, dict(name="absl", level=logging.ERROR, message="of another library", failed=True)),
        # Orbax goes on after a warning, so that nothing else says it.
        (True, dict(name="absl", level=logging.WARNING, message="Passed over", path=ORBAX, failed=True)),
        (
            False,
            dict(
                name="absl",
                level=logging.WARNING,
                message="Waiting for previous save to complete took 3.1 seconds.",
                path=ORBAX,
            ),
        ),
        (False, dict(name="absl", level=logging.ERROR, message="Save failed", path=ORBAX, failed=True)),
        (False, dict(name="asyncio", level=logging.ERROR, message="Task exception", failed=True)),
        (True, dict(name="asyncio", level=logging.ERROR, message="a slow callback")),
    ],
)
def test_what_is_said_elsewhere_is_left_out(caplog, capsys, shown, record):
    # What libraries show reaches the root logger, our own messages only standard error.
    before = absl_logging.get_verbosity()
    with plain_log():
        _log(**record)
    absl_logging.set_verbosity(before)
    assert (record["message"] in caplog.text + capsys.readouterr().err) == shown
    assert "disk full" not in caplog.text or shown


def test_a_message_stands_on_a_line_of_its_own_beside_a_progress_bar(capsys):
    with plain_log() as logger, tqdm(total=5, file=sys.stderr, mininterval=0) as bar:
        bar.update(2)
        logger.info("a message")
        bar.update(1)
    lines = [line.split("\r")[-1] for line in capsys.readouterr().err.split("\n")]
    assert "a message" in lines


def test_what_nothing_can_catch_is_printed_unless_it_is_of_a_closed_loop(capsys, monkeypatch):
    class Failing:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # not that of pytest
    with plain_log():
        for message in ("Event loop is closed", "anything else"):
            Failing(message)
    assert sys.unraisablehook is sys.__unraisablehook__
    said = capsys.readouterr().err
    assert "anything else" in said and "Event loop" not in said
