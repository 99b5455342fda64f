"""Audits: the budget and its cases, verdicts, records, and the committed audits, which keep the budget."""

import dataclasses
import json
import pathlib

import pytest

from ultramem_jax.config import RunConfig
from ultramem_jax.errors import UserError
from ultramem_jax.planning import audit_tables
from ultramem_jax.planning.audit import PROGRAMS, Audit, Case, kept, load, load_budget, save
from ultramem_jax.planning.findings import Finding, Findings
from ultramem_jax.planning.targets import load_target

COMMITTED = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "audit"
CASES, LIMITS = load_budget()
NOTHING = Findings(
    kernels=9,
    unbounded_loops=(),
    table_copies=(),
    sorts=(),
    scatters=(),
    solvers=(),
    custom_calls=(),
    dense_ragged=(),
    host_transfers=(),
    padded=(),
)
CLEAN = Audit(
    case=Case("small", RunConfig(), "train", "h100"),
    compiler="a compiler 1.0",
    program="0123",
    seconds=2.0,
    arguments=1000,
    argument_padding=10,
    temporaries=119,
    expected_temporaries={"logits": 60, "gradients": 40},
    not_aliased=4,
    findings=NOTHING,
    collectives={"all-reduce along data": 12},
)


def _with(target="h100", **found):
    case = dataclasses.replace(CLEAN.case, target=target)
    return dataclasses.replace(CLEAN, case=case, findings=dataclasses.replace(NOTHING, **found))


def _one(what, width=0):
    return (Finding(what, "ultramem_jax/ops/x.py:7", 2, width),)


def test_the_budget_has_every_model_on_every_target_training_and_decoding():
    targets = {case.target for case in CASES}
    assert targets == {"h100", "tpu-v5e:2x2", "tpu-v5p:2x2x1"}
    models = {"ultramem-151m-x12", "ultramem-v2-227m", "moe-151m-2in32", "engram-151m-x12"}
    wanted = {(name, target, program) for name in models for target in targets for program in PROGRAMS}
    assert {(case.name, case.target, case.program) for case in CASES} == wanted
    assert len({case.title for case in CASES}) == len(CASES)
    for case in CASES:
        load_target(case.target)
        assert case.config.model.dtype == "bfloat16"
        sizes = case.config.mesh
        assert (sizes.memory if case.program == "train" and "v5e" in case.target else 1) == sizes.memory


def test_a_clean_program_holds():
    assert CLEAN.expected == 100 and CLEAN.broken(LIMITS) == []


@pytest.mark.parametrize(
    "found, message",
    [
        (
            {"table_copies": _one("copy f32[9,9]")},
            "copies of tables: 1, at most 0: copy f32[9,9] (ultramem_jax/ops/x.py:7)",
        ),
        ({"sorts": _one("sort f32[70,640]", 640)}, "sorts of rows wider than 16: 1"),
        ({"scatters": _one("atomic add to f32[9,9]")}, "atomic additions of floats: 1"),
        ({"solvers": _one("svd")}, "solvers: 1"),
        ({"dense_ragged": _one("dot")}, "dense expansions of ragged products: 1"),
        ({"host_transfers": _one("copy")}, "transfers to the host: 1"),
        ({"unbounded_loops": _one("3 arrays")}, "loops of unknown length: 1"),
    ],
)
def test_what_breaks_the_budget_is_named_with_its_source(found, message):
    (line,) = _with(**found).broken(LIMITS)
    assert line.startswith(message) and "ultramem_jax/ops/x.py:7" in line


def test_what_does_not_break_it():
    assert not _with(sorts=_one("sort u32[9999]", 0), scatters=_one("unique write to f32[9,9]")).broken(
        LIMITS
    )
    assert not _with(sorts=_one("sort f32[70,8]", 8), custom_calls=_one("__cublas$gemm")).broken(LIMITS)
    # A TPU does not ask the host before a pass of a loop.
    assert not _with("tpu-v5p", unbounded_loops=_one("3 arrays")).broken(LIMITS)


def test_temporaries_beyond_what_accounting_derives():
    (line,) = dataclasses.replace(CLEAN, temporaries=121).broken(LIMITS)
    assert line == "temporaries: 121 bytes, 1.21 times the 100 that accounting derives, at most 1.2"


def test_records_are_kept_for_the_same_program(tmp_path):
    found = _with(sorts=_one("sort f32[70,640]", 640), scatters=_one("unique write to f32[9,9]"))
    save(found, tmp_path)
    assert load(tmp_path / "small_h100_train.json") == found
    assert kept(found.case, tmp_path, "0123") == found
    assert kept(found.case, tmp_path, "4567") is None and kept(found.case, None, "0123") is None
    assert kept(dataclasses.replace(found.case, target="a100"), tmp_path, "0123") is None
    (tmp_path / "small_h100_train.json").write_text("{}")
    with pytest.raises(UserError, match="not an audit, KeyError"):
        load(tmp_path / "small_h100_train.json")


def test_the_document_has_a_verdict_and_sources():
    text = audit_tables.document([CLEAN, _with("a100", sorts=_one("sort f32[70,640]", 640))], LIMITS)
    assert "## small, training, h100" in text and "holds" in text
    assert "- **broken** sorts of rows wider than 16: 1" in text and "ultramem_jax/ops/x.py:7" in text


def test_a_budget_of_ones_own(tmp_path):
    path = tmp_path / "budget.json"
    model = {
        "preset": "ultramem-tiny",
        "changes": {"num_layers": 5, "memories": {"ultramem": {"address": {"top_m": 8}}}},
        "train": {"batch_size": 2, "seq_len": 32},
        "decode": {"batch_size": 3, "cache_length": 64},
        "targets": {"b200": {"memory": 2}},
    }
    path.write_text(json.dumps({"limits": dataclasses.asdict(LIMITS), "models": {"mine": model}}))
    (train, decode), limits = load_budget(path)
    assert limits == LIMITS
    assert train.title == "mine_b200_train" and train.config.mesh.memory == 2
    assert train.config.data.seq_len == 32 and train.config.train.batch_size == 2
    assert train.config.model.num_layers == 5 and train.config.model.memory.address.top_m == 8
    assert (
        decode.cache_length == 64 and decode.config.train.batch_size == 3 and decode.config.mesh.memory == 1
    )
    path.write_text("[]")
    with pytest.raises(UserError, match="not a budget"):
        load_budget(path)


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_audits_keep_the_budget(path):
    found = load(path)
    assert found.case in CASES and found.case.title == path.stem
    assert found.broken(LIMITS) == []
    assert audit_tables.title(found) in (COMMITTED / "README.md").read_text()
