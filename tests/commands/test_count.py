"""`count`: the tables it prints, and that nothing is built for them."""

import pathlib
import subprocess
import sys

import pytest

from ultramem_jax.commands.count_tables import LEGEND, count_rows, count_table, published_table
from ultramem_jax.errors import UserError
from ultramem_jax.presets import INFERRED, NOTES, PRESETS
from ultramem_jax.presets.published import PUBLISHED

ROOT = pathlib.Path(__file__).parents[2]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_counts_stand_in_aligned_columns():
    table = count_table(["dense-151m", "ultramem-151m-x12"], 64)
    header, _, dense, ultramem = cells(table)
    assert header == [
        "model",
        "dense params",
        "sparse params",
        "total params",
        "active params",
        "FLOPs (paper)",
        "FLOPs (all)",
        "bytes/token, B = 64",
        "of these sparse",
    ]
    # 3 memories x 1100² x 512 values are 1,858,560,000; a token reads 3 x 84 x 512 of them, 4 bytes each.
    assert (ultramem[0], ultramem[2], ultramem[8]) == ("ultramem-151m-x12 *", "1.8586 G", "516.10 k")
    assert dense[:4] == ["dense-151m *", "202.66 M", "0", "202.66 M"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_rows_hold_exact_numbers():
    (row,) = count_rows({"ours": PRESETS["ultramem-151m-x12"]}, 64)
    assert row["model"] == "ours"
    assert row["sparse params"] == 1_858_560_000
    assert row["of these sparse"] == 3 * 84 * 512 * 4
    assert row["total params"] == row["active params"] + 1_858_560_000


def test_published_figures_keep_their_digits_and_unit_and_stand_beside_ours():
    table = published_table(
        ["ultramem-tiny", "dense-151m", "moe-680m-2in33", "ladder-03-half-vdim", "ultramem-v2-227m-1.2b"]
    )
    header, _, *rows = cells(table)
    assert header == ["model", "quantity", "source", "published", "ours", "difference"]
    assert ["; ".join(row) for row in rows] == [
        "dense-151m *; total params; UltraMem, table 1; 0.15 B; 0.15099 B; +0.66% (rounding)",
        "dense-151m *; FLOPs/token; UltraMem, table 1; 0.30 G; 0.30199 G; +0.66% (rounding)",
        "moe-680m-2in33 *; total params; UltraMem, table 1; 8.95 B; 8.9477 B; -0.03% (rounding)",
        "moe-680m-2in33 *; FLOPs/token; UltraMem, table 1; 1.50 G; 1.5124 G; +0.83%",
        "ladder-03-half-vdim *; dense params; UltraMem, table 2; 178.47 M; 178.47 M; -0.00% (rounding)",
        "ladder-03-half-vdim *; sparse params; UltraMem, table 2; 1.529 G; 1.5288 G; -0.01% (rounding)",
        "ladder-03-half-vdim *; FLOPs/token; UltraMem, table 2; 356.98 M; 356.93 M; -0.01%",
        "ultramem-v2-227m-1.2b; total params; UltraMemV2, open models; 1.2 B; 1.2255 B; +2.13% (rounding)",
        "ultramem-v2-227m-1.2b; active params; UltraMemV2, open models; 227 M; 230.18 M; +1.40%",
    ]
    assert published_table(["dense-tiny"]) == ""


def test_every_published_model_can_be_compared():
    rows = cells(published_table(list(PRESETS)))[2:]
    assert {row[0].removesuffix(" *") for row in rows} == set(PUBLISHED)


def test_the_mark_is_on_the_shapes_of_which_something_was_inferred():
    rows = cells(count_table(list(PRESETS), 64))[2:]
    assert {row[0].removesuffix(" *") for row in rows if row[0].endswith("*")} == INFERRED
    for name, note in NOTES.items():
        assert (name in INFERRED) == ("Inferred" in note and "Inferred: nothing" not in note), name


@pytest.mark.parametrize("table", [lambda names: count_table(names, 1), published_table])
def test_an_unknown_preset_is_refused(table):
    with pytest.raises(UserError, match="did you mean 'dense-tiny'"):
        table(["dense-tine"])


def launch(*arguments):
    command = [sys.executable, "launch.py", "count", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_count_prints_both_tables_and_the_notes():
    done = launch("--preset=moe-tiny,ultramem-1.6b-x12", "--batch_tokens=8", "--notes")
    assert done.returncode == 0, done.stderr
    assert "bytes/token, B = 8" in done.stdout
    assert "Against what was published" in done.stdout and "21.413 B" in done.stdout
    assert "ultramem-1.6b-x12: UltraMem paper, table 1. Published: 21.41 B" in done.stdout
    assert "C4 validation loss 2.24 nats per token, 40.88 % on average over ten tasks." in done.stdout
    assert LEGEND in done.stdout and "dense-tiny" not in done.stdout
    tiny = launch("--preset=moe-tiny").stdout
    assert "published:" not in tiny and LEGEND not in tiny


def test_count_names_an_unknown_preset_in_one_line():
    done = launch("--preset=moe-tiny,dense-tine")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown preset 'dense-tine': did you mean 'dense-tiny'")
    assert len(done.stderr.splitlines()) == 1


def test_counting_does_not_import_jax():
    # Importing it would take longer than counting, and no array is needed.
    script = "import sys; import ultramem_jax.commands.count; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 0
