"""Parameters, FLOPs per token and bytes read per token of presets, beside what was published of them.

Counted from configs alone: nothing is built. The first table counts every parameter, embeddings among them;
active ones leave out tables and the experts that a token does not visit. FLOPs and bytes are per token, of a
forward pass: FLOPs as the papers count them and with lookups and logits, bytes of float32 parameters. The
second table follows the convention of each source and has its units; `(rounding)` marks a difference that the
printed digits hide. --notes adds what of each preset is published, its losses among it, and what inferred.
"""

from absl import flags

from ultramem_jax.commands.count_tables import LEGEND, count_table, published_table
from ultramem_jax.presets import INFERRED, NOTES, PRESETS, preset

PRESET = flags.DEFINE_string("preset", "all", "names of presets, with commas between them, or `all`")
BATCH = flags.DEFINE_integer("batch_tokens", 64, "tokens of a step, for the bytes read", lower_bound=1)
NOTES_TOO = flags.DEFINE_boolean("notes", False, "also say what of each preset is published, what inferred")


def main() -> None:
    """Prints the tables."""
    names = list(PRESETS) if PRESET.value == "all" else PRESET.value.split(",")
    for name in names:
        preset(name)
    print(count_table(names, BATCH.value))
    if against := published_table(names):
        print(f"\nAgainst what was published:\n\n{against}")
    if not INFERRED.isdisjoint(names):
        print(f"\n{LEGEND}")
    if NOTES_TOO.value:
        for name in names:
            print(f"\n{name}: {NOTES[name]}")
