"""`recall`: equal compute at every size, what is asked, runs that are not repeated, and the report."""

import csv
import dataclasses
import json
import math
import shutil
import statistics
from decimal import Decimal

import pytest

from experiments.configs import recall as recall_config
from experiments.recall import tables, trials
from experiments.recall.records import Answers, Run, Study
from experiments.recall.systems import SYSTEMS, variant
from experiments.recall.trials import TUNING_SEEDS, Trials, best_rate
from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.data.fact_words import ATTRIBUTES
from ultramem_jax.data.facts import Population, queries
from ultramem_jax.errors import LossNotFinite, UserError
from ultramem_jax.models.fact_recall import recall
from ultramem_jax.models.scoring import Scorer
from ultramem_jax.training.loop import train
from ultramem_jax.training.restore import load_model

BASE = recall_config.get_config()
PEOPLE, SEQ_LEN = 6, 64
BITS_OF_A_PERSON = sum(math.log2(len(of.values)) for of in ATTRIBUTES.values())
TINY = [
    *("--config.model.vocab_size=600", "--config.model.embed_dim=32", "--config.model.num_layers=1"),
    *("--config.model.num_heads=2", "--config.model.num_kv_heads=2", "--config.model.mlp_dim=128"),
    *("--config.model.memory.placement=1:1", "--config.model.memory.num_keys=8"),
    *("--config.model.memory.top_m=4", "--config.model.memory.key_dim=8"),
    *("--config.model.memory.value_dim=16", f"--config.data.dataset=facts:0-{PEOPLE}x2@3"),
    *("--config.data.bpe_vocab_size=600", f"--config.data.seq_len={SEQ_LEN}"),
    *("--config.train.steps=60", "--config.train.eval_batches=1"),
    *("--sizes=2", "--tuned_size=2", "--rates=0.02", "--seeds=1"),
]


def made(system, size, seed, bits, rate=0.01, sparse=None):
    """A run that holds so many bits; its other numbers follow from them."""
    answers = [Answers(num_queries, bits / 1000, 2.0, bits) for num_queries in (50, 50, 20)]
    of_size = 1000 * size if sparse is None else sparse
    return Run(system, size, "MLP 8", rate, seed, 500, of_size, 1234, *answers, 1.5, 100.0 + seed)


def study_of(runs, tunings=()):
    return Study({"cpu": "one"}, "3 steps.", 10, 1000.0, list(tunings), list(runs), [])


# Variants


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_variants_have_equal_compute_and_the_sparse_parameters_of_their_size(size):
    dense = variant(BASE.model, "dense", size)
    assert (dense.name, dense.size) == ("dense", 0) and dense == variant(BASE.model, "dense", 1)
    weights, flops = count_parameters(dense.model).paper_dense, flops_per_token(dense.model).matched
    assert weights == 2 * (4 * 48**2 + 2 * 48 * 192)  # two layers, with MLPs of the usual width
    for system in set(SYSTEMS) - {"dense"}:
        found = variant(BASE.model, system, size)
        assert found.name == f"{system}-{size}x"
        assert count_parameters(found.model).sparse == pytest.approx(size * weights, rel=0.04)
        assert flops_per_token(found.model).matched == pytest.approx(flops, rel=0.02)
        of = flops_per_token(found.model)
        assert of.router <= of.feed_forward  # experts take the compute


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"sizes = 2000: must be smaller: the memory alone"):
        variant(BASE.model, "ultramem", 2000)
    with pytest.raises(UserError, match=r"model.memories = \[\]: must be one memory"):
        variant(variant(BASE.model, "dense", 0).model, "ultramem", 2)


# Rates


def test_best_rate_is_that_of_most_bits():
    runs = [made("moe", 8, TUNING_SEEDS[0], bits, rate) for bits, rate in ((5, 0.1), (9, 0.2), (7, 0.05))]
    assert best_rate(runs) == 0.2 and best_rate(runs[::2]) == 0.05
    again = [made("moe", 8, TUNING_SEEDS[1], bits, rate) for bits, rate in ((5, 0.1), (1, 0.2), (7, 0.05))]
    assert best_rate(runs + again) == 0.05


def test_best_rate_of_runs_that_hold_nothing_is_that_of_the_likeliest_answers():
    runs = [made("moe", 8, TUNING_SEEDS[0], 0.0, rate) for rate in (0.1, 0.2, 0.05)]
    likely = dataclasses.replace(runs[1].statements, nats=1.0)
    runs[1] = dataclasses.replace(runs[1], statements=likely)
    assert best_rate(runs) == 0.2


def test_a_rate_at_which_the_loss_is_infinite_is_left_out(monkeypatch):
    def run(self, variant, rate, seed):
        return made(variant.system, variant.size, seed, rate, rate) if rate < 0.5 else None

    monkeypatch.setattr(Trials, "run", run)
    tune, of = object.__new__(Trials).tune, variant(BASE.model, "dense", 0)
    # The best of those that can be used is the lowest, so a lower one is tried.
    expected = [(rate, seed) for rate in (0.1, 0.011) for seed in TUNING_SEEDS]
    assert [(run.rate, run.seed) for run in tune(of, (0.1, 0.9))] == expected
    with pytest.raises(UserError, match="low enough for dense"):
        tune(of, (0.9,))


def test_a_run_whose_loss_is_infinite_is_kept_as_that_and_named(run, tmp_path, monkeypatch):
    trained = []

    def train_whole(config, folder, corpus):
        trained.append(config.train.seed)
        if config.train.seed == 1:
            folder.mkdir(parents=True)
            raise LossNotFinite("step 7: loss = nan: must be finite; there is no checkpoint yet")
        return train(config, folder, corpus=corpus)

    monkeypatch.setattr(trials, "train_whole", train_whole)
    flags = [*TINY, "--systems=dense", "--seeds=2", *_folders(tmp_path)]
    for _ in range(2):
        status, out, err = run("recall", *flags)
        assert status == 0 and "the loss became infinite: dense, seed 1." in out, err
    assert trained == [*TUNING_SEEDS, 0, 1]
    study = Study.load(tmp_path / "results" / "recall.json")
    assert study.diverged == ["dense, seed 1"] and [run.seed for run in study.runs] == [0]


# All of it


def test_every_system_has_its_best_rate_at_every_size(run, tmp_path, monkeypatch):
    asked = []
    bits = {
        ("dense", 0.005): 1.0,
        ("dense", 0.01): 3.0,
        ("dense", 0.02): 2.0,
        ("pkm", 0.01): 1.0,
        ("pkm", 0.02): 4.0,
        ("pkm", 0.04): 0.0,
    }

    def one(self, variant, rate, seed):
        asked.append((variant.name, rate, seed))
        return made(variant.system, variant.size, seed, bits[variant.system, rate], rate)

    monkeypatch.setattr(Trials, "run", one)
    flags = [*TINY, "--systems=dense,pkm", "--sizes=4,2", "--rates=0.02,0.01", "--seeds=2"]
    status, out, err = run("recall", *flags, *_folders(tmp_path))
    assert status == 0, err
    rates = {"dense": (0.01, 0.02, 0.005), "pkm-2x": (0.01, 0.02, 0.04)}
    tuned = [(name, rate, seed) for name, of in rates.items() for rate in of for seed in TUNING_SEEDS]
    trained = (("dense", 0.01), ("pkm-2x", 0.02), ("pkm-4x", 0.02))
    assert asked == tuned + [(*of, seed) for seed in (0, 1) for of in trained]
    # A report is written after each seed.
    assert out.count("One seed; ") == out.count("Means over 2 seeds, ") == 1
    study = Study.load(tmp_path / "results" / "recall.json")
    assert len(study.tunings) == 12 and len(study.runs) == 6
    assert study.people == PEOPLE and study.all_bits == pytest.approx(PEOPLE * BITS_OF_A_PERSON)
    assert (tmp_path / "results" / "recall.png").stat().st_size > 10_000


def test_a_run_is_examined_kept_and_not_repeated(run, tmp_path, monkeypatch):
    flags, results = [*TINY, "--systems=engram", *_folders(tmp_path)], tmp_path / "results"
    remove = shutil.rmtree
    # Keeps the checkpoint of one run, for a second examination.
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: "seed0" in str(path) or remove(path, **_))
    status, out, err = run("recall", *flags)
    assert status == 0, err
    folder = tmp_path / "runs"
    assert not (folder / f"engram-2x-0.02-seed{TUNING_SEEDS[0]}" / "checkpoints").exists()
    assert (results / "recall.md").read_text() in out
    study = json.loads((results / "recall.json").read_text())
    (result,) = study["runs"]
    assert result["statements"]["stored_bits"] > 0
    _check_examined(result, folder / "engram-2x-0.02-seed0")
    _check_table(result, study["all_bits"], results / "recall.csv")
    _check_resumption(run, flags, results, monkeypatch)


def _folders(path):
    return [
        *(f"--config.data.cache_dir={path / 'cache'}", f"--workdir={path / 'runs'}"),
        f"--results={path / 'results'}",
    ]


def _check_examined(result, folder):
    """Asks the model of a run again, by its checkpoint."""
    loaded = load_model(folder)
    parameters = count_parameters(loaded.config.model)
    assert (result["dense_parameters"], result["sparse_parameters"]) == (parameters.dense, parameters.sparse)
    people = list(Population(0, PEOPLE, 2, seed=3).people())
    unasked = [of for of in people if not of.quizzed]
    assert 0 < len(unasked) < PEOPLE
    scorer = Scorer(loaded.config.model, loaded.variables, max_length=SEQ_LEN, batch_size=64)
    forms = {"statements": (people, "statement"), "held_out": (people, "held_out_statement")}
    for name, (of, form) in {**forms, "questions": (unasked, "question")}.items():
        found = recall(scorer, loaded.tokenizer, queries(of, form, max_choices=1))
        assert result[name] == {
            "num_queries": 5 * len(of),
            "greedy": found.greedy,
            "nats": pytest.approx(found.nats, rel=1e-6),
            "stored_bits": pytest.approx(found.stored_bits, rel=1e-6),
        }


def _check_table(result, all_bits, path):
    with path.open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    bits, sparse = result["statements"]["stored_bits"], result["sparse_parameters"]
    parameters = result["dense_parameters"] + sparse
    assert (row["system"], row["size"], float(row["rate"])) == ("engram", "2×", 0.02)
    assert (int(row["parameters"]), int(row["sparse parameters"])) == (parameters, sparse)
    assert float(row["bits"]) == bits and float(row["share of all bits"]) == bits / all_bits
    assert float(row["bits/parameter"]) == bits / parameters
    assert float(row["bits/sparse parameter"]) == bits / sparse
    assert float(row["statements"]) == result["statements"]["greedy"]
    assert float(row["held-out statements"]) == result["held_out"]["greedy"]
    assert float(row["questions"]) == result["questions"]["greedy"]


def _check_resumption(run, flags, results, monkeypatch):
    """Asks for the same again, for which nothing is trained, and for something else."""
    raw, text = results / "recall.json", results / "recall.md"
    before, report = raw.read_bytes(), text.read_bytes()

    def train(*_, **__):
        raise AssertionError("a run that has ended was repeated")

    monkeypatch.setattr(trials, "train_whole", train)
    raw.unlink()
    status, _, err = run("recall", *flags)
    assert status == 0, err
    again, first = json.loads(raw.read_bytes()), json.loads(before)
    assert again == {**first, "environment": again["environment"]}
    raw.write_bytes(before)
    text.unlink()
    status, _, err = run("recall", "--redraw", f"--results={results}")
    assert status == 0 and text.read_bytes() == report, err
    for flag, said in (
        ("--config.train.steps=61", "holds a run of another config, corpus or tokenizer"),
        ("--config.data.seq_len=8", "data.seq_len = 8: must be at least"),
        ("--config.data.dataset=stdlib", "data.dataset = 'stdlib': must be facts:FIRST-END"),
        ("--rates=0.1,fast", "rates = 'fast': must be numbers above 0"),
        ("--sizes=0", "sizes = '0': must be whole numbers above 0"),
    ):
        status, _, err = run("recall", *flags, flag)
        assert status == 2 and said in err and len(err.splitlines()) == 1


def test_nothing_to_redraw(run, tmp_path):
    status, _, err = run("recall", "--redraw", f"--results={tmp_path}")
    assert status == 2 and "must hold the recall.json of an earlier run" in err


# The report


@pytest.mark.parametrize(
    ("shares", "size"),
    [
        ({2: 0.1, 4: 0.3, 8: 0.305, 16: 0.31}, 4),
        ({2: 0.1, 4: 0.105, 8: 0.3, 16: 0.305}, 8),  # a flat piece before the last rise is no bend
        ({2: 0.1, 4: 0.2, 8: 0.3}, None),
        ({2: 0.5, 4: 0.5, 8: 0.4}, 2),
        ({2: 0.1, 32: 0.13}, 2),  # four doublings of less than one percent
        ({2: 0.1, 32: 0.15}, None),
        ({2: 0.43, 8: 0.26, 32: 0.3}, 2),  # what grows again must exceed what was before
        ({8: 0.4}, None),
    ],
)
def test_where_a_curve_bends(shares, size):
    assert tables.bend({of: [share] for of, share in shares.items()}) == size


def test_a_gain_within_its_standard_error_is_none():
    assert tables.bend({2: [0.1, 0.3], 4: [0.2, 0.4]}) == 2  # 0.1 ± 0.14
    assert tables.bend({2: [0.19, 0.21], 4: [0.29, 0.31]}) is None


def test_rows_are_means_over_the_seeds_in_order():
    runs = [made("moe", 4, 0, 300.0), made("dense", 0, 0, 100.0), made("moe", 2, 0, 200.0)]
    runs += [made("moe", 4, 1, 500.0), made("dense", 0, 1, 140.0), made("moe", 2, 1, 220.0)]
    rows = [tables.row(study_of(runs), of) for of in tables.groups(runs)]
    assert [(row["system"], row["size"]) for row in rows] == [("moe", "2×"), ("moe", "4×"), ("dense", "")]
    four = rows[1]
    assert (four["parameters"], four["sparse parameters"], four["bits"]) == (4500, 4000, 400.0)
    assert four["share of all bits"] == pytest.approx(0.4)
    assert four["± (share)"] == pytest.approx(statistics.stdev([0.3, 0.5]))
    assert four["bits/parameter"] == pytest.approx(400 / 4500)
    assert four["bits/sparse parameter"] == pytest.approx(0.1) and four["tokens/s"] == 100
    assert rows[2]["bits/sparse parameter"] is None


def test_words_say_what_is_held_and_where_it_bends():
    bits = {"moe": {2: 200.0, 4: 290.0, 8: 296.0}, "pkm": {2: 100.0, 4: 130.0, 8: 160.0}}
    runs = [made("dense", 0, seed, 150.0) for seed in (0, 1)]
    runs += [made(s, n, seed, bit) for s, of in bits.items() for n, bit in of.items() for seed in (0, 1)]
    assert tables.in_words(study_of(runs)) == [
        "The dense model holds 15 % of all bits, 0.30 per parameter.",
        "moe: 20 % of all bits at 2×, 30 % at 8×, most at 8× (30 %); more than 4× add nothing beyond "
        "the noise. "
        "It holds more than the dense model of the same seed in 6 of 6 runs.",
        "pkm: 10 % of all bits at 2×, 16 % at 8×, most at 8× (16 %); 8× still add something. "
        "It holds more than the dense model of the same seed in 2 of 6 runs.",
    ]


def test_rates_are_reported(tmp_path):
    tunings = [made("moe", 8, TUNING_SEEDS[0], bits, rate) for bits, rate in ((100.0, 0.01), (300.0, 0.02))]
    tunings.append(made("dense", 0, TUNING_SEEDS[0], 50.0, 0.02))
    rows = tables.tuning_rows(study_of([], tunings))
    assert rows[0] == {"system": "moe", "size": "8×", "0.01": 0.1, "0.02": 0.3, "chosen": Decimal("0.02")}
    assert rows[1] == {"system": "dense", "size": "", "0.01": None, "0.02": 0.05, "chosen": Decimal("0.02")}


def test_figure_has_a_line_for_each_system(drawn, tmp_path):
    runs = [made("moe", n, seed, 100.0 * n + 10 * seed) for n in (2, 4) for seed in (0, 1)]
    runs += [made("engram", n, seed, 120.0 * n) for n in (2, 4) for seed in (0, 1)]
    runs += [made("dense", 0, seed, 100.0, sparse=0) for seed in (0, 1)]
    tables.write(study_of(runs, [made("moe", 8, TUNING_SEEDS[0], 1.0)]), tmp_path)
    held, capacity = drawn[0].axes
    lines = {line.get_label(): line for line in held.get_lines()}
    assert lines["moe"].get_xdata().tolist() == [2.5, 4.5]
    assert lines["moe"].get_ydata().tolist() == pytest.approx([0.205, 0.405])
    assert set(lines["all bits"].get_ydata()) == {1.0}
    of_engram = next(line for line in capacity.get_lines() if line.get_label() == "engram")
    assert of_engram.get_ydata().tolist() == pytest.approx([240 / 2500, 480 / 4500])
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert sorted(legend) == ["all bits", "dense", "engram", "moe"]
