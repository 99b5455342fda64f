"""Hardware is known by name, or read from a file that is checked by field."""

import dataclasses
import json

import pytest

from tests.support.planned import ROUND
from ultramem_jax import UserError
from ultramem_jax.planning.hardware import HARDWARE, hardware_of, load_hardware
from ultramem_jax.planning.targets import CARDS, TPUS


def hardware_file(folder, **changed):
    tree = dataclasses.asdict(ROUND) | changed
    path = folder / "mine.json"
    path.write_text(json.dumps({name: value for name, value in tree.items() if value is not None}))
    return str(path)


def test_hardware_is_read_from_a_file(tmp_path):
    assert load_hardware(hardware_file(tmp_path)) == ROUND
    assert load_hardware(hardware_file(tmp_path, notes=["measured"])).notes == ("measured",)
    assert load_hardware("tpu-v5p").node_link_bytes == 200e9


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"memory_bytes": "80 GB"}, "hardware.memory_bytes = '80 GB': must be a number above 0"),
        ({"bf16_flops": -1}, "hardware.bf16_flops = -1: must be a number above 0"),
        ({"fp32_flops": float("inf")}, "hardware.fp32_flops = inf: must be a number above 0"),
        ({"access_bytes": 0}, "hardware.access_bytes = 0: must be a whole number, at least 1"),
        ({"devices_per_node": 2.5}, "hardware.devices_per_node = 2.5: must be a whole number, at least 1"),
        ({"devices_per_node": True}, "hardware.devices_per_node = True: must be a whole number, at least 1"),
        ({"name": ""}, "hardware.name = '': must be a string, not empty"),
        ({"notes": "mine"}, "hardware.notes = 'mine': must be a list of strings"),
        ({"outer_link_bytes": None}, "hardware.outer_link_bytes = None: must be given in "),
        ({"memory_byte": 1}, r"unknown field of --hardware .* 'memory_byte': did you mean 'memory_bytes'\?"),
    ],
)
def test_a_malformed_file_is_refused_by_field(tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        load_hardware(hardware_file(tmp_path, **changed))


def test_a_file_must_be_a_json_object(tmp_path):
    path = tmp_path / "mine.json"
    for text, said in (("{", "not a JSON file"), ("[1]", "must hold one JSON object")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            load_hardware(str(path))


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        # As the compilers of the targets tpu-v5e, tpu-v5p and tpu-v6e call them.
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        # Other clocks and memory than the SXM card.
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_devices_with_published_rates(kind, name):
    assert hardware_of(kind) is (HARDWARE[name] if name else None)


def test_every_target_of_the_audit_has_published_rates():
    assert {*CARDS, *TPUS} == set(HARDWARE)
