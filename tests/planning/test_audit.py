"""Audits: the budget and its cases, verdicts, records, and the committed audits, which keep the budget."""

import dataclasses
import json
import pathlib

import pytest

from tests.support.here import Here
from ultramem_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.errors import UserError
from ultramem_jax.planning import audit as audits
from ultramem_jax.planning import audit_tables
from ultramem_jax.planning.audit import PROGRAMS, Audit, Auditor, Case, load, load_budget, save
from ultramem_jax.planning.findings import NOTHING, VERSION, Finding
from ultramem_jax.planning.programs import Program, resolved
from ultramem_jax.planning.targets import load_target
from ultramem_jax.presets import families

COMMITTED = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "audit"
CASES, LIMITS = load_budget()
SMALL_MODEL = ModelConfig(vocab_size=31, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=24)
CLEAN = Audit(
    case=Case("small", RunConfig(), "train", "h100"),
    compiler="a compiler 1.0",
    program="0123",
    finder=VERSION,
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
        assert sizes.memory == (4 if case.program == "train" and "v5e" in case.target else 1)
    # Twenty memories take a TPU's compiler hours.
    part = {case.title for case in CASES if case.whole_layers}
    assert part == {f"ultramem-v2-227m_tpu-{kind}_train" for kind in ("v5e-2x2", "v5p-2x2x1")}
    assert all(case.layers == "4 of 20" for case in CASES if case.whole_layers)
    batches = {case.title: case.config.train.batch_size for case in CASES if case.program == "train"}
    few = [batches.pop(f"ultramem-v2-227m_{target}_train") for target in ("h100", "tpu-v5p-2x2x1")]
    assert few == [2, 2] and set(batches.values()) == {8}


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
        ({"scatters": _one("atomic add to f32[9,9]")}, "scatters that are atomic or one by one: 1"),
        ({"scatters": _one("one by one, scatter-add")}, "scatters that are atomic or one by one: 1"),
        ({"solvers": _one("svd")}, "solvers: 1"),
        ({"dense_ragged": _one("dot")}, "dense expansions of ragged products: 1"),
        ({"host_transfers": _one("copy")}, "transfers to the host: 1"),
        ({"unbounded_loops": _one("3 arrays")}, "loops of unknown length: 1"),
    ],
)
def test_what_breaks_the_budget_is_named_with_its_source(found, message):
    (line,) = _with(**found).broken(LIMITS)
    assert line.startswith(message) and "ultramem_jax/ops/x.py:7" in line


def test_a_step_that_reads_more_rows_than_a_table_has_is_named():
    memory = families.ultramem(placement="1:1", num_keys=8, top_m=4, num_heads=2, expansion=1)
    model = dataclasses.replace(SMALL_MODEL, memories={"memory": memory})
    broken = {}
    for batch in (1, 2):  # of 4 tokens, which read 4 of 64 rows twice
        config = RunConfig(model, DataConfig(seq_len=4), TrainConfig(batch_size=batch))
        found = _with(table_copies=_one("copy f32[64,9]"))
        broken[batch] = dataclasses.replace(
            found, case=dataclasses.replace(found.case, config=config)
        ).broken(LIMITS)
    assert len(broken[1]) == 1
    assert broken[2][1:] == broken[1]
    assert broken[2][0].startswith(
        "a step reads 64 rows of memory_0, which has 64: gradients of rows count as copies"
    )


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


def test_results_that_are_not_in_place():
    (line,) = dataclasses.replace(CLEAN, not_aliased=2_000_000).broken(LIMITS)
    assert line.startswith("results in new arrays: 2,000,000 bytes, at most 1,000,000; the state is not")


def test_records_come_back(tmp_path):
    found = _with(sorts=_one("sort f32[70,640]", 640), scatters=_one("unique write to f32[9,9]"))
    save(found, tmp_path)
    assert load(tmp_path / "small_h100_train.json") == found
    (tmp_path / "small_h100_train.json").write_text("{}")
    with pytest.raises(UserError, match="not an audit, KeyError"):
        load(tmp_path / "small_h100_train.json")


@pytest.fixture
def small(monkeypatch):
    """A case that compiles in seconds, and how often something was compiled."""
    monkeypatch.setattr(audits, "load_target", lambda name: Here(name, "gpu", "a card", ""))
    compiled = []
    compile_program = Program.compile
    monkeypatch.setattr(
        Program, "compile", lambda self, name: compiled.append(name) or compile_program(self, name)
    )
    config = RunConfig(SMALL_MODEL, DataConfig(seq_len=8), TrainConfig(batch_size=2))
    return Case("small", resolved(config), "decode", "h100", cache_length=16), compiled


def test_a_program_is_compiled_once(small, tmp_path, monkeypatch):
    case, compiled = small
    first = Auditor(case, tmp_path).audit()
    assert len(compiled) == 1 and first.findings.kernels > 10
    assert load(tmp_path / "small_h100_decode.json") == first
    assert Auditor(case, tmp_path).audit() == first and len(compiled) == 1
    # Another search looks through the text that was kept.
    monkeypatch.setattr(audits, "VERSION", VERSION + 1)
    monkeypatch.setattr(audits, "find", lambda text, tables: dataclasses.replace(NOTHING, kernels=3))
    again = Auditor(case, tmp_path).audit()
    assert again.findings.kernels == 3 and again.finder == VERSION + 1 and len(compiled) == 1
    assert load(tmp_path / "small_h100_decode.json") == again
    # Another derivation is compared with the program that there is.
    monkeypatch.setattr(audits, "decoding_temporaries", lambda *_, **__: {"logits": 7})
    derived = Auditor(case, tmp_path).audit()
    assert derived.expected == 7 and len(compiled) == 1
    assert load(tmp_path / "small_h100_decode.json") == derived


def test_what_cannot_be_kept_is_compiled_again(small, tmp_path, monkeypatch):
    case, compiled = small
    Auditor(case, tmp_path).audit()
    (tmp_path / "small_h100_decode.hlo.gz").unlink()
    Auditor(case, tmp_path).audit()
    assert len(compiled) == 1
    monkeypatch.setattr(audits, "VERSION", VERSION + 1)
    Auditor(case, tmp_path).audit()
    assert len(compiled) == 2
    record = tmp_path / "small_h100_decode.json"
    record.write_text(json.dumps({"program": "of an older release"}))
    Auditor(case, tmp_path).audit()
    assert len(compiled) == 3
    # Another description of the card is another program.
    monkeypatch.setattr(audits, "load_target", lambda name: Here(name, "gpu", "another card", ""))
    Auditor(case, tmp_path).audit()
    assert len(compiled) == 4
    Auditor(dataclasses.replace(case, cache_length=32), tmp_path).audit()
    assert len(compiled) == 5
    assert Auditor(case).audit().expected > 0  # without a folder


def test_a_card_of_ones_own_has_a_file_name():
    assert dataclasses.replace(CLEAN.case, target="cards/mine.txtpb").title == "small_mine_train"


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
        "targets": {"b200": {"mesh": {"memory": 2}, "train_layers": 4}},
    }
    path.write_text(json.dumps({"limits": dataclasses.asdict(LIMITS), "models": {"mine": model}}))
    (train, decode), limits = load_budget(path)
    assert limits == LIMITS
    assert train.title == "mine_b200_train" and train.config.mesh.memory == 2
    assert train.config.data.seq_len == 32 and train.config.train.batch_size == 2
    assert train.config.model.num_layers == 4 and train.layers == "4 of 5"
    assert train.config.model.memory.address.top_m == 8
    assert (
        decode.cache_length == 64 and decode.config.train.batch_size == 3 and decode.config.mesh.memory == 1
    )
    assert decode.config.model.num_layers == 5 and decode.layers == "5"
    trained = {name: value for name, value in model.items() if name != "decode"}
    trained |= {"train": model["train"] | {"remat": "layers"}}
    path.write_text(json.dumps({"limits": dataclasses.asdict(LIMITS), "models": {"mine": trained}}))
    (only,) = load_budget(path)[0]
    assert only.program == "train" and only.config.train.remat == "layers"
    whole = {"limits": dataclasses.asdict(LIMITS), "models": {"mine": model}}
    for broken in ({"limits": {}}, {"models": {}}, {"limits": whole["limits"] | {"solvers": "x"}}):
        path.write_text(json.dumps(whole | broken))
        with pytest.raises(UserError, match="not a budget"):
            load_budget(path)
    unknown = model | {"targets": {"h1000": {}}}
    path.write_text(json.dumps(whole | {"models": {"mine": unknown}}))
    with pytest.raises(UserError, match="unknown target 'h1000'"):
        load_budget(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="not a budget"):
        load_budget(path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_the_committed_audits_keep_the_budget(case):
    found = load(COMMITTED / f"{case.title}.json")
    assert found.case == case and found.finder == VERSION
    assert found.broken(LIMITS) == []
    assert audit_tables.title(found) in (COMMITTED / "README.md").read_text()
