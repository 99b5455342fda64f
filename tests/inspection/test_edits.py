"""An edit changes its rows and no other bit."""

import chex
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.inspection.models import MODEL, variables
from ultramem_jax.errors import UserError
from ultramem_jax.inspection import Edit, edit, parse_edit, row_changes


def _bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def _after(edits):
    held = variables()
    copy = {
        table: {part: np.array(rows) for part, rows in of.items()} for table, of in held["memory"].items()
    }
    edited = edit(MODEL, held, [parse_edit(MODEL, text) if isinstance(text, str) else text for text in edits])
    chex.assert_trees_all_equal(held["memory"], copy)  # the given ones stay as they are
    assert all(edited[part] is held[part] for part in ("params", "buffers"))
    return copy, edited["memory"]


def _differing(before, after):
    """(table, array) -> rows of which a bit differs."""
    rows = {
        (table, part): np.flatnonzero((_bits(of[part]) != _bits(after[table][part])).any(1)).tolist()
        for table, of in before.items()
        for part in of
    }
    return {key: slots for key, slots in rows.items() if slots}


def test_rows_of_every_action():
    values = np.linspace(-1, 1, 8)
    before, after = _after(
        [
            "ultramem_0:3=zero",
            "ultramem_0:9=scale:-0.3",
            Edit("ultramem_0", 12, "values", values=values),
            "ring_0:5=swap:40",
            "ring_1:1=copy:2",
            "engram_0:7=copy:7",
        ]
    )
    assert _differing(before, after) == {
        ("ultramem_0", "values"): [3, 9, 12],
        ("ring_tables", "values"): [1, 5, 40],
        ("ring_tables", "pre_values"): [1, 5, 40],
    }
    stored = np.asarray(after["ultramem_0"]["values"])
    assert (stored[3] == 0).all()
    old = before["ultramem_0"]["values"][9].view(ml_dtypes.bfloat16).astype(np.float32)
    scaled = (old * np.float32(-0.3)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored[9], scaled.view(np.uint16))
    np.testing.assert_array_equal(
        stored[12], values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    )
    for part in ("values", "pre_values"):
        ring = np.asarray(after["ring_tables"][part])
        np.testing.assert_array_equal(ring[[5, 40, 1]], before["ring_tables"][part][[40, 5, 2]])


def test_edits_are_made_in_order_and_reported():
    edits = [
        parse_edit(MODEL, text)
        for text in ("ultramem_0:3=zero", "ultramem_0:4=copy:3", "ultramem_0:4=scale:2")
    ]
    changes = row_changes(MODEL, variables()["memory"], edits)
    assert list(changes) == ["ultramem_0"] and list(changes["ultramem_0"]) == ["values"]
    change = changes["ultramem_0"]["values"]
    assert change.slots.tolist() == [3, 4] and (change.new == 0).all()
    np.testing.assert_array_equal(
        change.old, np.asarray(variables()["memory"]["ultramem_0"]["values"])[[3, 4]]
    )
    again = [parse_edit(MODEL, text) for text in ("ring_0:5=swap:40", "ring_0:40=swap:5")]
    assert row_changes(MODEL, variables()["memory"], again) == {}


def test_a_file_with_a_row(tmp_path):
    np.save(tmp_path / "row.npy", np.arange(4))
    _, after = _after([f"engram_0:11=values:{tmp_path / 'row.npy'}"])
    assert np.asarray(after["engram_0"]["values"])[11].tolist() == [0, 1, 2, 3]


def _header(text):
    """A .npy file of version 1 with a header and nothing else."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content, said",
    [
        (b"PK\x03\x04garbage", "must be a .npy file with one row: "),
        (b"", "must be a .npy file with one row: "),
        (_header(b"{((((\n"), "must be a .npy file with one row: "),
        (
            _header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,)}\n"),
            "must be a .npy file with one row: ",
        ),
        (
            _header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}\n" % (b"9" * 30)),
            "must be a .npy file with one row: ",
        ),
        (
            _header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}\n") + bytes(12),
            r"must be \(4,\)",
        ),
        (_header(b"{'descr': '<c8', 'fortran_order': False, 'shape': (4,)}\n") + bytes(32), "real numbers"),
    ],
)
def test_a_file_without_a_row(content, said, tmp_path):
    (tmp_path / "row.npy").write_bytes(content)
    with pytest.raises(UserError, match=f"row.npy.*{said}") as error:
        parse_edit(MODEL, f"engram_0:11=values:{tmp_path / 'row.npy'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("ultramem_0=zero", "edit = 'ultramem_0=zero': must be MEMORY:SLOT=zero"),
        ("ultramem_0:3", "edit = 'ultramem_0:3': must be"),
        ("ultramem_0:3=zero:1", "must be MEMORY:SLOT=zero"),
        ("ultramem_0:3=scale:x", "must be MEMORY:SLOT=zero"),
        ("ultramem_0:3=scale:nan", "FACTOR must be a finite number"),
        ("ultramem_0:3=copy:", "must be MEMORY:SLOT=zero"),
        (
            "ultramem_0:3=swop:4",
            "unknown action of edit = 'ultramem_0:3=swop:4': 'swop': did you mean 'swap'",
        ),
        ("ultramem_0:3=copy:64", r"slot of ultramem_0 = 64: must be in \[0, 64\)"),
        ("ring:3=zero", "unknown memory 'ring'"),
        ("ultramem_0:3=values:none.npy", "none.npy: must be a .npy file with one row"),
    ],
)
def test_refused_texts(text, said):
    with pytest.raises(UserError, match=said) as error:
        parse_edit(MODEL, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "one, said",
    [
        (Edit("ultramem_0", 3, "values", values=np.zeros(7)), r"values: shape = \(7,\): must be \(8,\)"),
        (Edit("ultramem_0", 3, "values", values=np.full(8, np.nan)), "must have finite values"),
        (Edit("ultramem_0", 3, "scale", factor=1e39), "must have finite values"),
        (Edit("ultramem_0", 3, "values", values=np.array(["a"] * 8)), "values: dtype = '<U1'"),
        (Edit("ultramem_0", -1, "zero"), "slot of ultramem_0 = -1"),
        (Edit("ultramem_0", 3, "swop"), "unknown action 'swop': did you mean 'swap'"),
    ],
)
def test_refused_edits(one, said):
    with pytest.raises(UserError, match=said):
        edit(MODEL, variables(), [one])


def test_zero_of_a_row_that_is_not_finite():
    held = variables()
    table = held["memory"]["engram_0"]
    broken = held | {"memory": held["memory"] | {"engram_0": {"values": table["values"].at[2].set(jnp.inf)}}}
    assert (
        np.asarray(edit(MODEL, broken, [Edit("engram_0", 2, "zero")])["memory"]["engram_0"]["values"])[2] == 0
    ).all()
