"""`audit`: what it writes and refuses; this machine's CPU stands for a card."""

import dataclasses
import json

import pytest

from tests.support.here import Here
from tests.support.programs import TINY
from ultramem_jax.errors import UserError
from ultramem_jax.planning import audit as audits
from ultramem_jax.planning.audit import load_budget
from ultramem_jax.planning.targets import load_target

DECODING = ("--program=decode", "--cache_length=16")


@pytest.fixture
def compilers(monkeypatch):
    monkeypatch.setattr(audits, "load_target", lambda name: Here(load_target(name).name, "gpu", name, ""))


def test_the_folder_has_all_audits_whatever_was_audited_last(compilers, run, tmp_path):
    out = tmp_path / "out"
    for target in ("h100", "a100"):
        status, printed, _ = run("audit", *TINY, *DECODING, f"--target={target}", f"--out={out}")
        assert status == 0 and f"| {target}" in printed
    report = (out / "README.md").read_text()
    assert "decoding, h100" in report and "decoding, a100" in report
    (out / "README.md").unlink()
    assert run("audit", "--redraw", f"--out={out}")[0] == 0
    assert (out / "README.md").read_text() == report


def test_a_broken_budget_is_an_error_also_when_it_is_redrawn(compilers, run, tmp_path):
    # What else a CPU's program breaks differs from release to release.
    others = {"temporaries_ratio": 100, "atomic_scatters": 100}
    limits = dataclasses.asdict(load_budget()[1]) | others | {"new_result_bytes": 0}
    models = {"mine": json.loads(_MODEL)}
    budget, out = tmp_path / "budget.json", tmp_path / "out"
    budget.write_text(json.dumps({"limits": limits, "models": models}))
    for arguments in ((), ("--redraw",)):
        status, _, err = run("audit", f"--budget={budget}", f"--out={out}", *arguments)
        assert status == 2 and _BROKEN in err


def test_cases_that_are_refused_do_not_end_the_others(compilers, run, tmp_path, monkeypatch):
    models = {"mine": json.loads(_MODEL)}
    budget, out = tmp_path / "budget.json", tmp_path / "out"
    budget.write_text(json.dumps({"limits": dataclasses.asdict(load_budget()[1]), "models": models}))

    def refuse(*_):
        raise UserError("it does not fit")

    monkeypatch.setattr(audits, "training_program", refuse)
    status, _, err = run("audit", f"--budget={budget}", f"--out={out}")
    assert status == 2 and "mine_b200_train: it does not fit" in err
    assert [path.name for path in out.glob("*.json")] == ["mine_b200_decode.json"]


# Metrics are new results.
_BROKEN = "error: the budget is broken: mine_b200_train: results in new arrays: "
_MODEL = """{
    "preset": "ultramem-tiny",
    "changes": {"num_layers": 2, "memories": {"ultramem": {"placement": "1:2", "address": {"num_keys": 32}}}},
    "train": {"batch_size": 2, "seq_len": 8},
    "decode": {"batch_size": 2, "cache_length": 16},
    "targets": {"b200": {}}
}"""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--target=h1000",), "unknown target"),
        (("--target=h100,",), "must be targets, separated by commas"),
        (("--target=h100", "--program=run"), "--program"),
        (("--program=decode",), "--target = '': must name a target to audit a config of your own"),
        (("--config.train.batch_size=8",), "--target = '': must name a target"),
        (("--redraw",), "must name the folder"),
        (("--redraw", "--out=EMPTY"), "must hold audits"),
        (("--target=h100", "--cache_length=0"), "cache_length"),
    ],
)
def test_what_is_refused(arguments, message, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    status, _, err = run("audit", *(argument.replace("EMPTY", str(empty)) for argument in arguments))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
