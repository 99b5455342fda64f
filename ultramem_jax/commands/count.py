"""Counts parameters, FLOPs per token and bytes read per token of presets, beside the published counts.

Everything is counted from configs; no model is built.

- The first table counts every parameter, including embeddings. Active parameters leave out tables, and the
  experts that a token does not visit. FLOPs and bytes are per token, of a forward pass. FLOPs are given as
  the papers count them, and with lookups and logits. Bytes are of float32 parameters.
- The second table compares with published counts. It follows the convention and the units of each source.
  `(rounding)` marks a difference that is smaller than the rounding of the printed digits.
- --notes prints which values of each preset are published, including its losses, and which are inferred.

    ultramem count --preset=ultramem-151m-x12,moe-151m-2in32 --notes
"""

from absl import flags

from ultramem_jax.commands.count_tables import LEGEND, count_table, published_table
from ultramem_jax.presets import INFERRED, NOTES, PRESETS, preset

PRESET = flags.DEFINE_string("preset", "all", "comma-separated names of presets, or `all`")
BATCH = flags.DEFINE_integer("batch_tokens", 64, "tokens of the step whose bytes are counted", lower_bound=1)
NOTES_TOO = flags.DEFINE_boolean(
    "notes", False, "also print which values of each preset are published and which are inferred"
)


def main() -> None:
    """Prints the tables of the presets that --preset names."""
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
