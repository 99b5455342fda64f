"""Holds a model with memories of several kinds, its variables, and texts, all of one length."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.drawn import variables_of
from ultramem_jax.config import ModelConfig
from ultramem_jax.data import ByteTokenizer
from ultramem_jax.presets import families

BASE = ModelConfig(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=24, tie_embeddings=False)
SMALL = dict(num_keys=8, top_m=4, key_dim=8, value_dim=8)
MODEL = replace(
    BASE,
    memories={
        # Four blocks, two weights of each read, rows as bits of bfloat16.
        "ultramem": families.ultramem(placement="1:1", num_heads=2, dtype="bfloat16", **SMALL),
        # Two memories that share a table, and pre-values.
        "ring": families.ultramem_v2(placement="1:1/2:2", pre_value_dim=4, **SMALL),
        # Rows apart, and read by tokens.
        "engram": families.engram(
            placement="before@2", heads_per_order=2, rows_per_head=(40,), value_dim=4, num_canonical_ids=200
        ),
    },
)
TOKENIZER = ByteTokenizer()
TEXTS = [
    b"the slot of a key </script>",
    b"\xff\xfe a\x00b\n caf\xc3\xa9 \xe2\x80\xaex \r y <&> ",
    b"a key of a slot of a key  .",
]
"""Texts of 27, 27 and 27 bytes: programs are compiled for one length."""


@functools.cache
def variables():
    """Random variables, none of which have special values; buffers that map tokens to fewer ids."""
    rng = np.random.default_rng(0)
    held = variables_of(MODEL)
    params = jax.tree.map(
        lambda a: np.asarray(a) + np.asarray(0.1, a.dtype) * np.asarray(rng.normal(size=a.shape), a.dtype),
        held["params"],
    )
    buffers = held["buffers"] | {"engram_0": {"canonical_ids": jnp.arange(257, dtype=jnp.int32) % 200}}
    return held | {"params": params, "buffers": buffers}


def batches():
    """Batches (2, S) of the texts as documents; the last one has a row of padding and a padded sequence."""
    rows = [np.concatenate([[256], TOKENIZER.encode(text)]) for text in TEXTS]
    shorter = np.where(np.arange(len(rows[0])) < 20, rows[1], -1)
    nothing = np.full(len(rows[0]), -1)
    return [
        np.stack(pair).astype(np.int32)
        for pair in ((rows[0], rows[2]), (shorter, rows[0]), (rows[2], nothing))
    ]


def stored_as_float(table):
    """The numbers of a table, in float64."""
    table = np.asarray(table)
    return (table.view(jnp.bfloat16) if table.dtype == np.uint16 else table).astype(np.float64)
