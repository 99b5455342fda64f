"""python launch.py <experiment> [flags]: runs one of the experiments; alone, lists them.

With --processes=N, before or after the name, it runs in N processes.
"""

import importlib
import os
import sys

from experiments import EXPERIMENTS, IN_SEVERAL_PROCESSES


def main(argv: list[str]) -> int:
    """Runs the experiment that `argv[1]` names and returns its exit status."""
    from experiments import local_processes
    from ultramem_jax.errors import UserError, require, unknown

    try:
        processes, argv = local_processes.take_processes(argv)
        if len(argv) < 2 or argv[1] in ("-h", "--help"):
            print(_overview())
            return 0
        from experiments import cli

        name = argv[1]
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
        together = name in IN_SEVERAL_PROCESSES
        allowed = f"must be 1 for {name!r}; in several run {', '.join(IN_SEVERAL_PROCESSES)}"
        require(processes == 1 or together, "--processes", processes, allowed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if processes > 1 and not any(flag in cli.HELP for flag in argv):
        return local_processes.run([sys.executable, os.path.abspath(__file__), *argv[1:]], processes)
    module = importlib.import_module(f"experiments.{name}")
    base = getattr(module, "BASE_CONFIG", None)
    return cli.run(module.main, [f"launch.py {name}", *argv[2:]], module.__doc__ or "", base, together)


def _overview() -> str:
    lines = [
        "usage: python launch.py <experiment> [flags]     (--help after an experiment lists its flags)",
        f"       --processes=N runs {', '.join(IN_SEVERAL_PROCESSES)} in N processes of this machine",
        "",
    ]
    return "\n".join([*lines, *(f"  {name:12} {summary}" for name, summary in EXPERIMENTS.items())])


def use_huge_pages() -> None:
    """Starts this process again with a C library that asks Linux for huge pages.

    A step allocates and touches some hundred MB anew, and reads rows all over gigabytes: both are slow on
    pages of 4 kB (docs/performance.md). The C library reads the wish when a process starts, and only there.
    """
    name, wish = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
    wishes = os.environ.get(name, "")
    if sys.platform == "linux" and sys.executable and wish not in wishes:
        os.environ[name] = ":".join(filter(None, [wishes, f"{wish}=1"]))
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    use_huge_pages()
    sys.exit(main(sys.argv))
