"""The first training command of the guide to many devices runs on a mesh of the tests' eight devices."""

from tests.support.fixtures import standard_promotion  # noqa: F401
from tests.support.guides import commands, smaller


def test_a_run_is_laid_out_on_a_mesh(run, folder):
    words = next(iter(commands("many_devices")))
    assert "--mesh=data:2,memory:4" in words
    status, _, err = run(*smaller(words))
    assert status == 0, err
    assert (folder / "runs" / "mesh" / "metrics.jsonl").exists()
