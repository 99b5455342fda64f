"""Lists the commands that `ultramem` and `python launch.py` run; each is a module with a `main()`."""

from ultramem_jax.cli.launcher import Command

COMMANDS = {
    "train": Command(
        "ultramem_jax.commands.train",
        "train a language model, or resume an interrupted run",
        in_several_processes=True,
    ),
    "evaluate": Command(
        "ultramem_jax.commands.evaluate",
        "bits per byte, or tasks of lm-evaluation-harness, of a checkpoint or an open model",
    ),
    "generate": Command(
        "ultramem_jax.commands.generate",
        "continue a prompt, or a batch of prompts, with a checkpoint or an open model",
    ),
    "export": Command(
        "ultramem_jax.commands.export",
        "write a checkpoint as a folder in Hugging Face's form, with its tokenizer",
    ),
    "background": Command(
        "ultramem_jax.commands.background",
        "count how text reads the slots of a memory, for fine-tuning that keeps what it has learned",
    ),
    "inspect": Command(
        "ultramem_jax.commands.inspect",
        "an HTML page of what a text reads in the memories, of knock-outs, or a model with edited rows",
    ),
    "count": Command(
        "ultramem_jax.commands.count",
        "parameters, FLOPs and bytes read per token of the presets, without building them",
    ),
    "plan": Command(
        "ultramem_jax.commands.plan",
        "bytes, collectives and time of a step on any mesh, without its devices",
    ),
    "audit": Command(
        "ultramem_jax.commands.audit",
        "what the compilers of GPUs and TPUs make of a step, without the devices",
    ),
    "accelerator": Command(
        "ultramem_jax.commands.accelerator",
        "speed and correctness of the library on this machine's GPU or TPU, under a time limit",
    ),
}
"""Commands by their names on the command line, in the order in which they are listed."""
