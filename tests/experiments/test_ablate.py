"""The ablation: what is trained, once; how differences are taken; what is written of them."""

import csv
import dataclasses
import itertools
import json
import statistics
from decimal import Decimal

import pytest

from experiments.ablate import tables
from experiments.ablate.tables import Difference, in_words, make_study, rank_correlation, write
from experiments.common import seeds
from experiments.configs import ablate as ablate_config
from experiments.configs import ablate_151m
from ultramem_jax import ModelConfig, UserError
from ultramem_jax.presets import families
from ultramem_jax.presets import ladder as ladders
from ultramem_jax.presets.ladder import GRID, LADDER, RUNGS
from ultramem_jax.presets.published import PUBLISHED

LOSSES = {name: float(PUBLISHED[name].val_loss) for name in RUNGS}


def _rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _result(*bits):
    return {"bits": list(bits), "tokens_per_second": 1000.0, "environment": {"cpu": "a"}}


def _results(study, losses, noise=(0.0, 0.5)):
    """Two seeds: the second is worse by the same for all, which pairing must take out."""
    return {name: [_result(9.0, losses[name] + shift) for shift in noise] for name in study.trained}


def test_a_model_of_two_names_is_trained_once_and_always_under_the_same_one():
    whole = make_study("tiny", tables.PARTS)
    assert len(whole.trained) == 20 and set(RUNGS) <= set(whole.trained)
    assert whole.trained_as["ive-e4"] == "ladder-07-ive"
    ive = make_study("tiny", ["ive"])
    assert list(ive.trained) == ["ladder-06-query-key-ln", "ladder-07-ive", "ive-e9", "ive-e16"]
    assert ive.trained_as["ive-e4"] == "ladder-07-ive"
    for part in tables.PARTS:
        study = make_study("151m", [part])
        assert set(study.trained) <= set(whole.trained)


@pytest.mark.parametrize("parts, said", [([], "name at least one"), (["laddr"], "did you mean 'ladder'")])
def test_parts_that_cannot_be_trained(parts, said):
    with pytest.raises(UserError, match=said):
        make_study("tiny", parts)


def test_the_config_is_for_the_tiny_ladder():
    config = ablate_config.get_config()
    assert config.model == ModelConfig()
    assert config.model == dataclasses.replace(ladders.ladder("tiny")[RUNGS[0]], memories={})


def test_the_config_for_the_paper_s_sizes_has_the_paper_s_training():
    config = ablate_151m.get_config()
    train = config.train
    # 1.0 T tokens; learning rate, warm-up, decay to a tenth; weight decay and betas of AdamW.
    assert train.steps * train.batch_size * config.data.seq_len == 238_418 * 2048 * 2048
    assert (train.learning_rate, train.warmup_fraction, train.final_lr_fraction) == (6e-4, 0.01, 0.1)
    assert (train.weight_decay, train.b1, train.b2) == (0.1, 0.9, 0.95)
    assert (config.data.dataset, config.data.tokenizer) == ("tfds:c4/en", "bpe")
    assert config.model == ModelConfig()
    models = make_study("151m", tables.PARTS).trained.values()
    assert {model.vocab_size for model in models} == {config.data.bpe_vocab_size}
    assert {model.dropout for model in models} == {0.1}


def test_ladder_table_holds_paired_differences_beside_the_paper_s(tmp_path):
    study = make_study("tiny", ["ladder"])
    losses = dict(LOSSES)
    losses["ladder-04-share-query"] = 2.790  # better than the rung before; the paper's is worse
    table, figure = write(study, _results(study, losses), tmp_path, ["Note."])
    rows = _rows(tmp_path / "ladder.csv")
    assert [row["rung"] for row in rows[:2]] == ["PKM", "+ rm softmax"]
    assert rows[0]["Δ"] == rows[0]["paper Δ"] == ""
    bits = [losses[name] + 0.25 for name in RUNGS]
    assert [float(row["validation bits/byte"]) for row in rows] == pytest.approx(bits)
    assert float(rows[1]["± (val.)"]) == pytest.approx(statistics.stdev([0, 0.5]))
    assert [row["rung"].removeprefix("+ ") for row in rows] == [rung.change for rung in LADDER]
    for row, (before, after) in zip(rows[1:], itertools.pairwise(RUNGS), strict=True):
        assert float(row["Δ"]) == pytest.approx(losses[after] - losses[before])
        assert float(row["± (Δ)"]) == pytest.approx(0, abs=1e-12)
        assert row["paper val. loss"] == str(PUBLISHED[after].val_loss)
        assert row["paper Δ"] == f"{LOSSES[after] - LOSSES[before]:.3f}".replace("-0.000", "0.000")
    assert (rows[0]["dense parameters"], rows[0]["sparse parameters"]) == ("963904", str(248**2 * 128))
    text = table.read_text()
    assert "Their signs differ at 1 of 10: share query (-0.0100 ± 0.0000 here, +0.003 published)." in text
    assert "so without a sign: query conv" in text
    assert text.index("Note.") < text.index("## Where it differs") < text.index("## Where this was measured")
    assert figure.stat().st_size > 10_000


def test_grid_table_has_each_base_once_and_compares_alone_with_alone(tmp_path):
    study = make_study("tiny", ["ive", "alone"])
    losses = {name: 2.0 - 0.1 * i for i, name in enumerate(study.trained)}
    table, figure = write(study, _results(study, losses), tmp_path, [])
    rows = {(row["grid"], row["config"]): row for row in _rows(tmp_path / "grids.csv")}
    assert list(rows) == [
        ("ive", "ladder-06-query-key-ln"),
        *(("ive", name) for name in ("ive-e4", "ive-e9", "ive-e16")),
        ("alone", "ladder-06-query-key-ln"),
        *(("alone", name) for name in ("ive-alone", "tdqkr-alone", "mcs-alone")),
    ]
    for (_, name), row in rows.items():
        if base := row["compared with"]:
            expected = losses[study.trained_as[name]] - losses[study.trained_as[base]]
            assert float(row["Δ"]) == pytest.approx(expected)
    assert rows["alone", "mcs-alone"]["compared with"] == "tdqkr-alone"
    assert rows["ive", "ive-e9"]["paper Δ"] == "-0.025"
    assert rows["alone", "ive-alone"]["paper Δ"] == ""
    assert not (tmp_path / "ladder.md").exists()
    assert "Their signs differ at 0 of 3." in table.read_text()
    assert figure.stat().st_size > 10_000


def test_words_are_computed_from_the_numbers():
    differences = [
        Difference("a", [-0.3, -0.1], Decimal("-0.02")),
        Difference("b", [0.2, -0.1], Decimal("-0.01")),
        Difference("c", [0.3, 0.5], Decimal("0.01")),
        Difference("d", [0.1, 0.1], None),
    ]
    assert in_words(differences) == [
        "Rank correlation (Spearman) of our 3 Δ with the published ones: 1.00.",
        "Their signs differ at 1 of 3: b (+0.0500 ± 0.2121 here, -0.01 published).",
        "Our Δ that are no larger than their standard deviation over the seeds, so that their sign is open: "
        "b.",
    ]
    assert in_words([Difference("d", [0.1], None)]) == []


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        # Ranks 0, 1, 2, 3 and 0, 1.5, 1.5, 3: covariance 4.5, squares 5 and 4.5.
        ([1, 2, 3, 4], [1, 5, 5, 7], 4.5 / (5 * 4.5) ** 0.5),
        ([1, 2, 3], [4, 4, 4], float("nan")),
    ],
)
def test_rank_correlation_by_hand(x, y, rho):
    assert rank_correlation(x, y) == pytest.approx(rho, nan_ok=True)


def test_two_rungs_end_to_end_and_again_without_training(run, text, tmp_path, monkeypatch):
    layers = ModelConfig(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, mlp_dim=16)
    memory = families.pkm(placement="1:1", num_keys=8, top_m=4, key_dim=8, value_dim=16)
    small = dataclasses.replace(
        ladders._SHAPES["tiny"],
        first=dataclasses.replace(layers, memories={"memory": memory}),
        sizes={
            "ladder-03-half-vdim": dict(value_dim=8, num_keys=11),
            "ladder-05-split-skip": dict(placement="1:1/2:2", num_keys=8),
        },
    )
    monkeypatch.setitem(ladders._SHAPES, "tiny", small)
    monkeypatch.setattr(tables, "GRID", GRID[:1])
    command = ["ablate", "--parts=ive", "--seeds=1", *text, "--config.data.seq_len=16"]
    command += [f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"]
    command += ["--config.train.steps=2", "--config.train.eval_every=1", "--config.train.eval_batches=1"]
    status, out, err = run(*command)
    assert status == 0, err
    names = ["ladder-06-query-key-ln", "ladder-07-ive"]
    folders = [tmp_path / "runs" / f"{name}-seed0" for name in names]
    assert sorted(p for p in (tmp_path / "runs").iterdir() if p.name != "compiled") == folders
    assert not list((tmp_path / "runs").rglob("checkpoints"))
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert [result["steps"] for result in results] == [[1, 2], [1, 2]]
    # What makes a result recognisable when the tables are written anew.
    assert all(result["test_batches"] is None and len(result["corpus_hash"]) == 64 for result in results)
    assert [
        result["config"]["model"]["memories"]["ultramem"]["address"]["expansion"] for result in results
    ] == [1, 4]
    rows = _rows(tmp_path / "results" / "grids.csv")
    bits = [result["bits"][-1] for result in results]
    assert [float(row["validation bits/byte"]) for row in rows] == bits
    assert float(rows[1]["Δ"]) == bits[1] - bits[0]
    assert [row["sparse parameters"] for row in rows] == [str(2 * 64 * 8)] * 2
    table = (tmp_path / "results" / "grids.md").read_text()
    assert "Models of width 16 with 2 layers, 2 steps of 8 × 16 tokens" in table and table.strip() in out
    assert not (tmp_path / "results" / "ladder.md").exists()

    monkeypatch.setattr(seeds, "train_whole", None)  # the second time nothing is trained
    status, _, err = run(*command)
    assert status == 0, err
    assert (tmp_path / "results" / "grids.md").read_text() == table
    status, _, err = run(*command, "--config.train.learning_rate=0.5")
    assert status == 2 and "another config" in err
