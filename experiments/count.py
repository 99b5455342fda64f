"""Parameters, FLOPs per token and bytes read per token, from configs alone: nothing is built."""

from absl import flags

from ultramem_jax.accounting import count_table
from ultramem_jax.presets import NOTES, PRESETS, preset

PRESET = flags.DEFINE_string("preset", "all", "names of presets, with commas between them, or `all`")
BATCH = flags.DEFINE_integer("batch_tokens", 64, "tokens of a step, for the bytes read", lower_bound=1)
NOTES_TOO = flags.DEFINE_boolean("notes", False, "also say what of each preset is published, what inferred")


def main() -> None:
    """Prints the table."""
    names = list(PRESETS) if PRESET.value == "all" else PRESET.value.split(",")
    for name in names:
        preset(name)
    print(count_table(names, BATCH.value))
    if NOTES_TOO.value:
        for name in names:
            print(f"\n{name}: {NOTES[name]}")
