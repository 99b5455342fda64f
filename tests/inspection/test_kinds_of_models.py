"""The inspector's parts agree with the model itself, whatever kind of model holds the memory."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.inspection.models import BASE, SMALL, TEXTS, TOKENIZER
from tests.support.drawn import variables_of
from ultramem_jax.config import MoEConfig
from ultramem_jax.inspection import edit, knock_out, page, parse_edit, promoted_tokens, trace
from ultramem_jax.inspection.tracing import token_losses
from ultramem_jax.models import Transformer
from ultramem_jax.presets import families

PLUS = families.memory_plus(placement="1:1/2:2", num_heads=2, **SMALL)
WITH_MEMORY = replace(BASE, memories={"plus": PLUS})
MODELS = {
    "bfloat16": replace(WITH_MEMORY, dtype="bfloat16", memories={"plus": PLUS.changed(dtype="bfloat16")}),
    "tied embeddings": replace(WITH_MEMORY, tie_embeddings=True),
    "experts": replace(WITH_MEMORY, moe=MoEConfig(num_experts=4, top_k=2, expert_dim=8)),
    "scanned layers": replace(WITH_MEMORY, num_layers=6, scan_layers=True),
    "many tokens": replace(WITH_MEMORY, vocab_size=50_000),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_page_of_every_kind_of_model(kind):
    config = MODELS[kind]
    held, text = variables_of(config), TEXTS[0]
    traced = trace(config, held, TOKENIZER, text)
    logits = Transformer(config).apply(held, traced.ids[None])
    own = np.asarray(token_losses(logits, traced.ids[None]))[0]
    closely = dict(rtol=2e-2, atol=2e-2) if kind == "bfloat16" else dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(traced.losses, own, **closely)

    slot = int(traced.memories["plus_1"].slots[-1, 0])
    without = edit(config, held, [parse_edit(config, f"plus_1:{slot}=zero")])
    found = knock_out(config, held, TOKENIZER, text, {"plus_1": [slot]})
    np.testing.assert_allclose(found.without, trace(config, without, TOKENIZER, text).losses, **closely)

    written = page(config, held, TOKENIZER, text, cards=4, neighbours=1)
    data = json.loads(re.search(r'id="data">(.*?)</script>', written, re.DOTALL)[1])
    assert [token["loss"] for token in data["tokens"][1:]] == pytest.approx(traced.losses[1:], rel=1e-3)
    best = promoted_tokens(config, held, "plus_0", [slot], 1, vocab_size=TOKENIZER.vocab_size)
    assert best.promoted[0, 0] < TOKENIZER.vocab_size
    assert all(len(card["up"]) == 8 for card in data["tables"]["plus_tables"]["cards"].values())
    jax.clear_caches()
