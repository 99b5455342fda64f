"""A model with Engram from the command line: trained, evaluated, continued, counted, compared."""

from tests.support.programs import TINY

ENGRAM = [
    "--preset=engram-tiny",
    *(flag for flag in TINY if "model" in flag and "memory" not in flag),
    "--config.model.memory.placement=before@1",
    "--config.model.memory.rows_per_head=(61,)",
    "--config.model.memory.heads_per_order=2",
    "--config.data.seq_len=16",
    "--config.train.batch_size=8",
    "--config.train.steps=2",
    "--config.train.eval_batches=2",
]


def test_it_is_trained_evaluated_and_continued(run, text, tmp_path):
    status, _, err = run("train", *ENGRAM, *text, f"--workdir={tmp_path}")
    assert status == 0, err
    status, out, err = run("evaluate", f"--workdir={tmp_path}", "--batches=1", "--splits=validation")
    assert status == 0 and "bits" in out, err
    status, out, err = run("generate", f"--workdir={tmp_path}", "--prompt=def ", "--num_tokens=4")
    assert status == 0 and "def " in out, err


def test_rows_that_cannot_be_are_refused_in_a_line(run, tmp_path):
    for rows, said in (("(1,)", "rows_per_head = (1,)"), ("(7,8,9)", "rows_per_head = (7, 8, 9)")):
        flag = f"--config.model.memory.rows_per_head={rows}"
        status, _, err = run("train", "--preset=engram-tiny", flag, f"--workdir={tmp_path}")
        assert status == 2 and said in err and len(err.splitlines()) == 1


def test_it_is_counted(run):
    status, out, err = run("count", "--preset=engram-tiny,engram-27b-table")
    assert status == 0, err
    assert "engram-27b-table" in out and "5.7" in out


def test_a_combination_is_compared(run, text, tmp_path):
    small = [flag for flag in TINY if "num_keys" not in flag]
    flags = [*small, "--config.model.memory.num_keys=64", "--systems=ultramem-engram", "--seeds=1"]
    places = [f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}", "--test_batches=1"]
    status, _, err = run("compare", *flags, "--table_share=0.3", *text, *places)
    assert status == 0, err
    table = (tmp_path / "results" / "compare.md").read_text()
    assert "ultramem-engram" in table and "n-grams of 2 to 3" in table
