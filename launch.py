"""python launch.py <experiment> [flags]: runs one of the experiments; alone, lists them."""

import importlib
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


if __name__ == "__main__":
    sys.exit(main(sys.argv))
