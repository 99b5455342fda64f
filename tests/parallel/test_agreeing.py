"""Processes agree; the answers of the others are made up."""

import jax
import pytest

from ultramem_jax import UserError
from ultramem_jax.parallel import distributed
from ultramem_jax.training import checkpoints


def test_processes_that_are_about_to_do_different_things_are_refused(monkeypatch):
    distributed.require_same({"corpus": "a", "seed": 0})
    monkeypatch.setattr(distributed, "gather", lambda what: [what, what | {"seed": 7}])
    with pytest.raises(UserError, match=r"^seed = 0: is another one in process 1$"):
        distributed.require_same({"corpus": "a", "seed": 0})


def test_when_the_first_one_cannot_look_all_hear_of_it(monkeypatch, tmp_path):
    sent = []

    def from_first(value):
        sent.append(value)
        return value

    def look():
        raise PermissionError("no")

    with checkpoints.Checkpoints(tmp_path / "run") as run:
        monkeypatch.setattr(run, "_together", True)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(distributed, "from_first", from_first)
        assert run._agreed(lambda: [3, 4]) == [3, 4]
        with pytest.raises(OSError, match="PermissionError: no"):
            run._agreed(look)
        monkeypatch.undo()
    assert sent == [[[3, 4], None], [None, "PermissionError: no"]]
