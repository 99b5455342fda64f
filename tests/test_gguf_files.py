"""GGUF files: metadata and tensors against the format's definition and the package's reader; broken files."""

import os
import struct
import sys
import tracemalloc

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.assertions import refused
from tests.support.gguf_models import finished
from ultramem_jax import gguf_files
from ultramem_jax.errors import UserError
from ultramem_jax.gguf_files import open_gguf

TYPES = gguf.GGMLQuantizationType


def write(path, tensors, fields=None, **writer):
    """Writes tensors, which are arrays or (bytes, type), and fields (value, type, type of the items)."""
    file = gguf.GGUFWriter(path, "llama", **writer)
    for key, value in (fields or {}).items():
        file.add_key_value(key, *value)
    return finished(file, path, tensors)


def text(string):
    data = string if isinstance(string, bytes) else string.encode()
    return struct.pack("<Q", len(data)) + data


def by_hand(path, fields=(), tensors=(), magic=b"GGUF", version=3, data=bytes(256), counts=None):
    """Writes a file of fields (key, type, bytes) and tensors (name, shape, type, offset)."""
    counts = counts or (len(tensors), len(fields))
    head = magic + struct.pack("<IQQ", version, *counts)
    for key, kind, value in fields:
        head += text(key) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def random(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


# Dequantized with loops, from the definition of the blocks in ggml-common.h: numbers are float32, scales are
# stored as float16.


def half(data):
    return np.frombuffer(data, np.float16)[0].astype(np.float32)


def nibble(data, index):
    """The low halves of the bytes come first, then the high ones."""
    return data[index] & 15 if index < len(data) else data[index - len(data)] >> 4


def q8_0(block):
    return [half(block[:2]) * np.float32(byte) for byte in np.frombuffer(block[2:], np.int8)]


def q4_0(block):
    return [half(block[:2]) * np.float32(nibble(block[2:], i) - 8) for i in range(32)]


def q4_1(block):
    return [half(block[:2]) * np.float32(nibble(block[4:], i)) + half(block[2:4]) for i in range(32)]


def q5_0(block):
    fifth = int.from_bytes(block[2:6], "little")
    numbers = [nibble(block[6:], i) + 16 * (fifth >> i & 1) - 16 for i in range(32)]
    return [half(block[:2]) * np.float32(number) for number in numbers]


def q4_k(block):
    scale, least, packed, quants = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    numbers = []
    for part in range(8):
        if part < 4:
            own, offset = packed[part] & 63, packed[part + 4] & 63
        else:
            own = (packed[part + 4] & 15) + (packed[part - 4] >> 6) * 16
            offset = (packed[part + 4] >> 4) + (packed[part] >> 6) * 16
        pairs = quants[part // 2 * 32 : part // 2 * 32 + 32]
        for i in range(32):
            quant = np.float32(nibble(pairs, i + 32 * (part % 2)))
            numbers.append(scale * np.float32(own) * quant - least * np.float32(offset))
    return numbers


def q6_k(block):
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    numbers = []
    for i in range(256):
        half_block, rest = divmod(i, 128)
        quant = nibble(low[64 * half_block : 64 * half_block + 64], rest)
        quant += (high[32 * half_block + rest % 32] >> 2 * (rest // 32) & 3) * 16
        numbers.append(half(block[208:]) * np.float32(scales[i // 16]) * np.float32(quant - 32))
    return numbers


BLOCKS = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q4_K": q4_k, "Q6_K": q6_k}


def dequantized(stored, name):
    size = gguf.GGML_QUANT_SIZES[TYPES[name]][1]
    data = stored.tobytes()
    return np.array([BLOCKS[name](data[at : at + size]) for at in range(0, len(data), size)], np.float32)


STEPS = {"Q8_0": 1 / 254, "Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16}
"""Bound of the error of rounding, relative to the largest number of a block, with exact scales."""


@pytest.mark.parametrize("name", STEPS)
def test_quantized_tensors_come_back(tmp_path, name):
    numbers = random(3, 5, 64)
    stored = gguf.quants.quantize(numbers, TYPES[name])
    file = open_gguf(write(tmp_path / "m.gguf", {"before": random(7), "x": (stored, TYPES[name])}))
    read = file.read("x")
    assert file.shapes == {"before": (7,), "x": (3, 5, 64)} and file.dtype("x") == name
    assert read.dtype == np.float32 and read.flags.writeable
    np.testing.assert_array_equal(read, dequantized(stored, name).reshape(3, 5, 64))
    largest = np.abs(numbers).reshape(-1, 32).max(1)
    error = np.abs(read - numbers).reshape(-1, 32).max(1)
    assert (error <= (STEPS[name] + 2**-9) * largest).all()
    for part in range(3):
        np.testing.assert_array_equal(file.read_part("x", part), read[part])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_k_quants_are_those_of_their_definition(tmp_path, name):
    generator = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
    stored = generator.integers(0, 256, (2, 3, 2 * size), dtype=np.uint8)
    for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[name]:
        scales = generator.normal(size=(2, 3, 2)).astype(np.float16)
        stored.reshape(2, 3, 2, size)[..., at : at + 2] = scales[..., None].view(np.uint8)
    file = open_gguf(write(tmp_path / "m.gguf", {"x": (stored, TYPES[name])}))
    expected = dequantized(stored, name).reshape(2, 3, 2 * block)
    np.testing.assert_allclose(file.read("x"), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(file.read_part("x", 1), file.read("x")[1])


def test_long_tensors_are_dequantized_in_chunks(tmp_path):
    numbers = random(601, 1024)
    stored = gguf.quants.quantize(numbers, TYPES.Q8_0)
    assert numbers.size > 2 * gguf_files._CHUNK
    file = open_gguf(write(tmp_path / "m.gguf", {"x": (stored, TYPES.Q8_0)}))
    np.testing.assert_array_equal(file.read("x"), gguf.dequantize(stored, TYPES.Q8_0))


def test_floats_keep_their_dtypes(tmp_path):
    numbers = random(4, 3)
    bits = numbers.astype(jnp.bfloat16).view(np.uint16)
    tensors = {
        "f32": numbers,
        "f16": numbers.astype(np.float16),
        "f64": numbers.astype(np.float64),
        "bf16": (bits.view(np.uint8), TYPES.BF16),
    }
    file = open_gguf(write(tmp_path / "m.gguf", tensors))
    for name, dtype in (
        ("f32", np.float32),
        ("f16", np.float16),
        ("f64", np.float64),
        ("bf16", jnp.bfloat16),
    ):
        read = file.read(name)
        assert read.dtype == dtype and read.shape == (4, 3) and file.dtype(name) == name.upper()
        np.testing.assert_array_equal(read, numbers.astype(dtype))
        np.testing.assert_array_equal(file.read_part(name, 2), read[2])
        read[:] = 0  # its own memory: the file keeps its numbers
        np.testing.assert_array_equal(file.read(name), numbers.astype(dtype))


KINDS = gguf.GGUFValueType
FIELDS = {
    "a.u8": (200, KINDS.UINT8),
    "a.i8": (-5, KINDS.INT8),
    "a.u16": (60_000, KINDS.UINT16),
    "a.i16": (-6, KINDS.INT16),
    "a.u32": (2**32 - 1, KINDS.UINT32),
    "a.i32": (-7, KINDS.INT32),
    "a.u64": (2**63 + 1, KINDS.UINT64),
    "a.i64": (-(2**40), KINDS.INT64),
    "a.f32": (0.5, KINDS.FLOAT32),
    "a.f64": (1e300, KINDS.FLOAT64),
    "a.bool": (True, KINDS.BOOL),
    "a.text": ("Grüße\n", KINDS.STRING),
    "a.texts": (["", "a b", "Ġ"], KINDS.ARRAY, KINDS.STRING),
    "a.ints": ([1, -2, 3], KINDS.ARRAY, KINDS.INT32),
    "a.floats": ([0.25, -1.5], KINDS.ARRAY, KINDS.FLOAT32),
    "a.bools": ([True, False], KINDS.ARRAY, KINDS.BOOL),
}


def test_metadata_are_plain_values(tmp_path):
    path = write(tmp_path / "m.gguf", {"x": random(2, 2)}, FIELDS)
    fields = open_gguf(path).fields
    assert fields == {"general.architecture": "llama"} | {key: value[0] for key, value in FIELDS.items()}
    types = {key: type(value) for key, value in fields.items()}
    assert types == {"general.architecture": str} | {key: type(value[0]) for key, value in FIELDS.items()}
    theirs = gguf.GGUFReader(path).fields.items()
    assert fields == {key: field.contents() for key, field in theirs if not key.startswith("GGUF.")}


def test_a_large_vocabulary(tmp_path):
    tokens = [f"token {i}" for i in range(150_000)]
    fields = {
        "tokenizer.ggml.tokens": (tokens, KINDS.ARRAY, KINDS.STRING),
        "tokenizer.ggml.token_type": ([1] * len(tokens), KINDS.ARRAY, KINDS.INT32),
    }
    read = open_gguf(write(tmp_path / "m.gguf", {"x": random(2, 2)}, fields)).fields
    assert read["tokenizer.ggml.tokens"] == tokens
    assert read["tokenizer.ggml.token_type"] == [1] * len(tokens)


@pytest.mark.parametrize("alignment", [8, 64])
def test_another_alignment(tmp_path, alignment):
    path = tmp_path / "m.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_custom_alignment(alignment)
    for name in "ab":
        file.add_tensor(name, random(3, 1 + (name == "a")))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    assert open_gguf(path).fields["general.alignment"] == alignment
    np.testing.assert_array_equal(open_gguf(path).read("a"), random(3, 2))
    np.testing.assert_array_equal(open_gguf(path).read("b"), random(3, 1))


def test_what_is_no_file_of_the_format(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: open_gguf(tmp_path / "none"), f"{tmp_path}/none: no such file")
    refused(lambda: open_gguf(f"{tmp_path}/a\0b"), "no such file")
    for path in (tmp_path, tmp_path / "pipe"):
        refused(lambda path=path: open_gguf(path), f"{path}: cannot be read: not a regular file")
    for data in (b"", b"GG", b"GGML" + bytes(100), b"PK\3\4" + bytes(100)):
        (tmp_path / "m.gguf").write_bytes(data)
        refused(lambda: open_gguf(tmp_path / "m.gguf"), "m.gguf: not a GGUF file: it does not begin with")


def test_a_big_endian_file(tmp_path):
    path = write(tmp_path / "m.gguf", {"x": random(2, 2)}, endianess=gguf.GGUFEndian.BIG)
    refused(lambda: open_gguf(path), "m.gguf: a big-endian GGUF file; only little-endian ones are read")


def test_the_package_is_needed(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", {"x": random(2, 2)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(lambda: open_gguf(path), 'm.gguf: needs the package gguf: pip install "ultramem_jax[gguf]"')


U32 = struct.pack("<I", 7)
FULL = [("a" * 24, 4, U32)]  # the head ends without padding
BROKEN = {
    "version of GGUF = 1: must be 2 or 3": dict(version=1),
    "type of a.b = 13: a type that GGUF does not have": dict(fields=[("a.b", 13, U32)]),
    "type of a.b's items = 9: must be numbers": dict(fields=[("a.b", 9, struct.pack("<IQ", 9, 1))]),
    "length of a.b = 1099511627776: must be at most 4,194,304": dict(
        fields=[("a.b", 9, struct.pack("<IQ", 4, 2**40))]
    ),
    "a.b would end at byte 2,": dict(fields=[("a.b", 8, struct.pack("<Q", 2000))]),
    "length of a.b = 67108865: must be at most": dict(fields=[("a.b", 8, struct.pack("<Q", 2**26 + 1))]),
    "length of a key of the metadata = 1025": dict(fields=[("a" * 1025, 4, U32)]),
    "a.b: must be text in UTF-8": dict(fields=[("a.b", 8, text(b"\xff"))]),
    "a key of the metadata = 'a\\nb': must be printable": dict(fields=[("a\nb", 4, U32)]),
    "a key of the metadata = '': must be printable": dict(fields=[("", 4, U32)]),
    "a key of the metadata = 'a': must not be there twice": dict(fields=[("a", 4, U32)] * 2),
    "general.alignment = 7: must be a power of two": dict(fields=[("general.alignment", 4, U32)]),
    "the name of a tensor = 'x': must not be there twice": dict(
        tensors=[("x", (8,), 0, 0), ("x", (8,), 0, 32)]
    ),
    "dimensions of x = 0: must be in [1, 4]": dict(tensors=[("x", (), 0, 0)]),
    "dimensions of x = 5: must be in [1, 4]": dict(tensors=[("x", (1,) * 5, 0, 0)]),
    "x.shape = (3, 0): must be lengths of at least 1": dict(tensors=[("x", (0, 3), 0, 0)]),
    "x.dtype = 250: a type that gguf does not know": dict(tensors=[("x", (8,), 250, 0)]),
    "x.shape = (2, 48): must end on a multiple of 32, a block of Q4_0": dict(tensors=[("x", (48, 2), 2, 0)]),
    "offset of y = 0: must be 32": dict(tensors=[("x", (8,), 0, 0), ("y", (8,), 0, 0)]),
    "x would end at byte 4,611,686,018,427,38": dict(tensors=[("x", (2**60,), 0, 0)]),
    "y would end at byte": dict(tensors=[("x", (8,), 0, 0), ("y", (57,), 0, 32)]),
    "a key of the metadata would end at byte": dict(counts=(0, 2**63), fields=FULL, data=b""),
    "the name of a tensor would end at byte": dict(counts=(2**63, 1), fields=FULL, data=b""),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_head(tmp_path, message):
    path = by_hand(tmp_path / "m.gguf", **BROKEN[message])
    refused(lambda: open_gguf(path), f"{path}: ", message)


def test_a_file_written_by_hand_is_read(tmp_path):
    tensors = [("x", (8, 2), 0, 0), ("y", (32, 2), 2, 64)]
    for version in (2, 3):
        file = open_gguf(by_hand(tmp_path / "m.gguf", [("a", 4, U32)], tensors, version=version))
        assert file.fields == {"a": 7} and file.shapes == {"x": (2, 8), "y": (2, 32)}
        assert not file.read("x").any() and not file.read("y").any()


def test_tensors_that_are_no_floats(tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[TYPES.Q8_K]
    tensors = {"i": np.arange(4, dtype=np.int32), "k": (np.zeros((1, size), np.uint8), TYPES.Q8_K)}
    file = open_gguf(write(tmp_path / "m.gguf", tensors))
    assert file.shapes == {"i": (4,), "k": (1, block)}
    for call in (lambda: file.read("i"), lambda: file.require_floats("i")):
        refused(call, "m.gguf: i.dtype = 'I32': must be floats")
    for call in (lambda: file.read("k"), lambda: file.read_part("k", 0)):
        refused(call, "m.gguf: k.dtype = 'Q8_K': the package gguf cannot dequantize it")


def test_parts_that_are_not_there(tmp_path):
    file = open_gguf(write(tmp_path / "m.gguf", {"x": random(2, 3), "y": random(4)}))
    for index in (-1, 2):
        refused(lambda index=index: file.read_part("x", index), f"slice of x = {index}: must be in [0, 2)")
    refused(lambda: file.read_part("y", 0), "slice of y = 0: must be in [0, 0)")


def test_a_file_that_changes_after_it_is_opened(tmp_path):
    quantized = gguf.quants.quantize(random(2, 64), TYPES.Q8_0)
    path = write(tmp_path / "m.gguf", {"x": random(2, 64), "y": (quantized, TYPES.Q8_0)})
    file = open_gguf(path)
    whole = path.stat().st_size
    os.truncate(path, whole - 64 - 128)  # within the last row of y, which is padded to 160 bytes
    first = file.read_part("x", 0)
    np.testing.assert_array_equal(first, random(2, 64)[0])
    refused(lambda: file.read("y"), "m.gguf: y cannot be read: the file has become shorter")
    os.truncate(path, 300)
    refused(lambda: file.read("x"), "m.gguf: x cannot be read: the file has become shorter")
    path.unlink()
    refused(lambda: file.read("x"), "m.gguf: x cannot be read: ", "No such file")


def small_file(path):
    """Writes a file with everything in it whose bytes are then broken."""
    tensors = {
        "x": random(2, 4),
        "y": (gguf.quants.quantize(random(2, 32), TYPES.Q5_0), TYPES.Q5_0),
        "z": (np.zeros((2, 210), np.uint8), TYPES.Q6_K),
    }
    return write(path, tensors, FIELDS)


def read_all(path):
    file = open_gguf(path)
    for name, shape in file.shapes.items():
        assert file.read(name).shape == shape


def test_every_shorter_file_is_refused(tmp_path):
    data = small_file(tmp_path / "whole.gguf").read_bytes()
    end = len(data) - 28  # 420 bytes of the last tensor are padded to 448
    path = tmp_path / "cut.gguf"
    for cut in np.linspace(0, end - 1, 200, dtype=int):
        path.write_bytes(data[:cut])
        refused(lambda: read_all(path), str(path))
    path.write_bytes(data[:end])
    read_all(path)


def test_flipped_bytes_take_no_memory_and_give_one_line(tmp_path):
    data = small_file(tmp_path / "whole.gguf").read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / "flipped.gguf"
    refusals = 0
    tracemalloc.start()
    for at in range(0, len(data), 2):
        changed = bytearray(data)
        changed[at] ^= int(generator.choice([0x80, 0xFF, 1 << generator.integers(8)]))
        path.write_bytes(changed)
        try:
            read_all(path)
        except UserError as error:
            refusals += 1
            assert str(path) in str(error) and "\n" not in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusals > 200 and peak < 8e6
