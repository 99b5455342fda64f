"""Every kind of addresser in the registry keeps every promise, and so do kinds together in one model."""

import contextlib
from dataclasses import replace

import pytest

from tests.support.memory_contract import (
    BASE,
    CHECKS,
    counted_equals_real_shapes,
    eight_devices_equal_one,
    forget,
    kernels_equal_jax,
    restored_equals_saved,
    served_equals_trained,
)
from ultramem_jax.config import MoEConfig
from ultramem_jax.config.memory import memory_of
from ultramem_jax.config.memory_kinds import ADDRESSERS
from ultramem_jax.kernels import native
from ultramem_jax.presets import families

ULTRAMEM = families.ultramem(placement="1:2", num_keys=8, top_m=4, num_heads=2, key_dim=8, value_dim=8)
NGRAMS = memory_of(
    "hashed_ngrams",
    "context_gate",
    placement="before@2",
    heads_per_order=2,
    rows_per_head=(29, 41),
    row_multiple=4,
    value_dim=4,
    conv_width=3,
)
MODELS = {
    "product_keys": replace(BASE, memories={"ultramem": ULTRAMEM}),
    "hashed_ngrams": replace(BASE, memories={"engram": NGRAMS}),
}
TOGETHER = replace(
    BASE,
    moe=MoEConfig(num_experts=4, top_k=2, expert_dim=8),
    memories={"ultramem": ULTRAMEM.changed(placement="instead@2"), "engram": NGRAMS},
)


@pytest.fixture(scope="module", params=["native", "jax"], autouse=True)
def way(request):
    """Every promise is kept by native kernels, and without them."""
    if request.param == "native" and not native.status().on:
        pytest.skip(str(native.status()))
    with native.turned_off() if request.param == "jax" else contextlib.nullcontext():
        yield request.param
    forget()


def test_every_kind_is_there():
    assert set(MODELS) >= set(ADDRESSERS.kinds())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_contract(name, check):
    check(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_kernels_train_as_jax_does(way, name):
    if way == "native":
        kernels_equal_jax(MODELS[name])


@pytest.mark.parametrize(
    "check", (eight_devices_equal_one, served_equals_trained, counted_equals_real_shapes)
)
def test_kinds_together(check):
    # Experts on a mesh have tests of their own, and take long to compile.
    check(replace(TOGETHER, moe=None) if check is eight_devices_equal_one else TOGETHER)


def test_product_keys_are_restored(tmp_path):
    restored_equals_saved(MODELS["product_keys"], tmp_path)


def test_ngrams_in_bfloat16_and_in_the_memory_of_the_host_are_restored(tmp_path):
    there = NGRAMS.changed(dtype="bfloat16", memory_kind="pinned_host")
    restored_equals_saved(replace(BASE, memories={"engram": there}), tmp_path)
