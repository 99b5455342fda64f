"""Lists the commands that `ultramem` and `python launch.py` run; each is a module with a `main()`."""

from ultramem_jax.cli.launcher import Command

COMMANDS = {
    "train": Command(
        "ultramem_jax.commands.train",
        "train a language model, or go on with a run that was cut off",
        in_several_processes=True,
    ),
    "evaluate": Command(
        "ultramem_jax.commands.evaluate",
        "validation and test bits per byte of a checkpoint, with a sliding window if wanted",
    ),
    "generate": Command(
        "ultramem_jax.commands.generate", "continue a prompt with a checkpoint, or several as one batch"
    ),
    "count": Command(
        "ultramem_jax.commands.count",
        "parameters, FLOPs and bytes read per token of the presets, without building them",
    ),
    "plan": Command(
        "ultramem_jax.commands.plan",
        "bytes, collectives and time of a step on a mesh that is not there, by compiling only",
    ),
}
"""Name on the command line -> the command, in the order in which they are listed."""
