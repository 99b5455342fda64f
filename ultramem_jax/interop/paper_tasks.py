"""Names the ten benchmarks of the UltraMem paper as tasks of lm-evaluation-harness."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

PAPER = "paper"
"""Name that stands for all of `PAPER_TASKS` in a list of tasks."""

PAPER_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "ARC-C": "arc_challenge",
        "GPQA": "gpqa_main_zeroshot",
        "TriviaQA": "triviaqa",
        "MMLU": "mmlu",
        "BBH": "bbh",
        "BoolQ": "boolq",
        "HellaSwag": "hellaswag",
        "WinoGrande": "winogrande",
        "AGIEval": "agieval_en",
        "DROP": "drop",
    }
)
"""Column of the paper's table of all downstream results (arXiv 2411.12364, appendix) -> task of the harness.

The paper gives neither prompts nor numbers of examples in them. So each task has the number of examples that
the harness gives it: none, but for three in those of BBH, which reason before they answer. Numbers of the
paper and of the harness are not comparable, only numbers of the harness with each other.
"""


def expanded(tasks: Sequence[str]) -> list[str]:
    """Returns names of tasks, each once, with those of `PAPER_TASKS` in place of `PAPER`."""
    return list(
        dict.fromkeys(name for task in tasks for name in (PAPER_TASKS.values() if task == PAPER else (task,)))
    )
