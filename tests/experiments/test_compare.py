"""The comparison's table: what it says of each system."""

import pytest

from experiments.compare.tables import notes, row, shape
from experiments.configs import compare as compare_config
from ultramem_jax import UserError
from ultramem_jax.data import Corpus
from ultramem_jax.presets import PRESETS


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("dense-tiny", "MLP 768"),
        ("moe-tiny", "2 of 34 experts, 376 wide"),
        ("moe-fine-tiny", "8 of 147 SwiGLU experts, 58 wide"),
        ("pkm-tiny", "1 × (n 320, d_k 144, d_v 128, 2·32 reads), MLP 512"),
        ("pkm-improved-tiny", "1 × (n 320, d_k 144, d_v 128, 2·32 reads, query/key norm), MLP 512"),
        (
            "memory-plus-tiny",
            "2 × (n 320, d_k 53, d_v 128, 2·16 reads, query/key norm, gate) on one table, MLP 512",
        ),
        ("peer-tiny", "1 × (n 226, d_k 44, d_v 128, d_p 128, 8·8 reads, query norm), MLP 512"),
        ("ultramem-tiny", "2 × (n 320, E 4, r 2, d_k 32, d_v 64, 2·16 reads, query/key norm), MLP 512"),
        (
            "ultramem-v2-tiny",
            "4 × (n 226, r 2, d_k 32, d_v 32, d_p 32, 1·16 reads, query/key norm), each on 50% of one table, "
            "MLP 536",
        ),
    ],
)
def test_shape_of_every_system(preset, said):
    assert shape(PRESETS[preset]) == said


def test_row_is_means_and_deviations_over_the_runs():
    runs = [
        {"bits": [3.0, 2.0], "test_bits": 1.5, "tokens_per_second": 100.0},
        {"bits": [3.5, 2.5], "test_bits": 1.7, "tokens_per_second": float("nan")},
    ]
    told = row("dense", PRESETS["dense-tiny"], runs)
    assert told["system"] == "dense" and told["validation bits/byte"] == 2.25
    assert told["± (val.)"] == pytest.approx(0.5 / 2**0.5) and told["± (test)"] == pytest.approx(0.2 / 2**0.5)
    assert told["test bits/byte"] == pytest.approx(1.6) and told["tokens/s"] == 100


def test_a_run_without_a_test_is_not_left_out_of_the_mean():
    runs = [{"bits": [2.0], "test_bits": bits, "tokens_per_second": 1.0} for bits in (1.5, None)]
    with pytest.raises(UserError, match="no test bits per byte"):
        row("dense", PRESETS["dense-tiny"], runs)


def test_notes_tell_training_and_learning_rates():
    class Told:
        num_tokens = {"train": 2_500_000}  # noqa: RUF012
        corpus_hash = "0123456789abcdef"

    corpus: Corpus = Told()
    models = {name: PRESETS[f"{name}-tiny"] for name in ("ultramem", "dense", "pkm", "ultramem-v2")}
    first, *_, rates, _ = notes(compare_config.get_config(), corpus, models, 3)
    assert first == (
        "700 steps of 8 × 256 tokens (1.43 M), learning rate 0.003; corpus stdlib, 2.50 M tokens of "
        "training, hash 0123456789ab."
    )
    assert rates.endswith("starts at 1 × (pkm), 4 × (ultramem-v2), 10 × (ultramem).")
