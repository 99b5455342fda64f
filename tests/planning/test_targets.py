"""Devices that are not there: their names, their descriptions, and what is said without a compiler."""

import importlib.util

import pytest

from ultramem_jax.errors import UserError
from ultramem_jax.planning.targets import CARDS, TPUS, load_target


@pytest.mark.parametrize("name", CARDS)
def test_cards(name):
    target = load_target(name)
    assert target.platform == "gpu" and target.name == name
    text = target.kind
    assert text.count("{") == text.count("}") and f"core_count: {CARDS[name].cores}" in text
    assert f"cuda_compute_capability {{ major: {CARDS[name].capability} }}" in text


@pytest.mark.parametrize(
    "name, topology", [("tpu-v5e", "2x2"), ("tpu-v5p:8x8x16", "8x8x16"), ("tpu-v6e:4x4", "4x4")]
)
def test_tpus(name, topology):
    target = load_target(name)
    assert (target.platform, target.topology) == ("tpu", topology)
    assert f"tpu-{target.kind}" in TPUS


def test_a_file_describes_a_card(tmp_path):
    path = tmp_path / "my_card.txtpb"
    path.write_text(CARDS["a100"].text())
    target = load_target(str(path))
    assert (target.name, target.platform, target.kind) == (str(path), "gpu", CARDS["a100"].text())


@pytest.mark.parametrize(
    "name, message",
    [
        ("h10", "did you mean 'h100'"),
        ("tpu-v5e:2x2x1", r"--target = 'tpu-v5e:2x2x1': must be tpu-v5e or tpu-v5e:AxB"),
        ("tpu-v5p:2x2", r"must be tpu-v5p or tpu-v5p:AxBxC"),
        ("tpu-v5e:0x2", "must be tpu-v5e or"),
        ("tpu-v9", "unknown target 'tpu-v9'"),
        ("", "unknown target ''"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(UserError, match=message) as caught:
        load_target(name)
    assert "\n" not in str(caught.value)


def test_a_file_that_describes_no_card_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("a card")
    with pytest.raises(UserError, match="must hold a GpuTargetConfigProto"):
        load_target(str(path))
    path.write_text("gpu_device_info { }")
    with pytest.raises(UserError, match="it has no threads_per_block_limit"):
        load_target(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_target(str(path))


@pytest.mark.parametrize("name, package", [("h100", "jax-cuda13-pjrt"), ("tpu-v5e", "libtpu")])
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compilers are installed")
def test_a_missing_compiler_is_named(name, package):
    with pytest.raises(UserError, match=f"needs the package {package}; install requirements-audit.txt"):
        load_target(name).devices(1)
