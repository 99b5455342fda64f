"""python launch.py <experiment> [flags]: runs one of the experiments; alone, lists them."""

import importlib
import os
import sys

from experiments import EXPERIMENTS


def main(argv: list[str]) -> int:
    """Runs the experiment that `argv[1]` names and returns its exit status."""
    if len(argv) < 2 or argv[1] in ("-h", "--help"):
        print(
            "usage: python launch.py <experiment> [flags]     (--help after an experiment lists its flags)\n"
        )
        for name, summary in EXPERIMENTS.items():
            print(f"  {name:10} {summary}")
        return 0
    from experiments import cli
    from ultramem_jax.errors import unknown

    name = argv[1]
    if name not in EXPERIMENTS:
        print(f"error: {unknown('experiment', name, EXPERIMENTS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"experiments.{name}")
    base = getattr(module, "BASE_CONFIG", None)
    return cli.run(module.main, [f"launch.py {name}", *argv[2:]], module.__doc__ or "", base)


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
