"""The experiments: programs driven by absl flags, run by `python launch.py <experiment> [flags]`."""

EXPERIMENTS = {
    "train": "train a language model, or go on with a run that was cut off",
    "evaluate": "validation and test bits per byte of a checkpoint, with a sliding window if wanted",
    "generate": "continue a prompt with a checkpoint, or several as one batch",
    "compare": "UltraMem and its rivals at equal compute and equal sparse parameters",
    "ablate": "the ladder from PKM to UltraMem, one change at a time, and the grids of E, r and h",
    "row_states": "what is kept of a table's rows in training: its cost in memory and in loss",
    "bench_step": "time of a training step against the slots of a memory, with its floor and its parts",
    "bench_decode": "time of a decoding step against batch and slots, beside dense, MoE and PKM",
    "bench_owner": "what one of P owners of a table does with it, timed on this machine",
    "plan": "bytes, collectives and time of a step on a mesh that is not there, by compiling alone",
    "count": "parameters, FLOPs and bytes read per token of the presets, without building them",
}
"""Name of the module -> what it does, in a line."""

IN_SEVERAL_PROCESSES = ("train", "compare", "ablate", "row_states")
"""Those that train."""
