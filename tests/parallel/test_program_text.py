"""Arrays, sources and walks through the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from ultramem_jax.parallel.program_text import Array, arrays, parts, read_program, type_bytes, walk


@pytest.mark.parametrize(
    "text, size, padded",
    [
        ("f32[8,2]{1,0:T(2,128)}", 64, 4096),  # 2 rows of a tile hold the 8 rows in 4 tiles
        ("f32[8,2]{1,0:T(8,128)}", 64, 4096),
        ("bf16[2048,32,2]{1,2,0:T(2,128)(2,1)}", 262144, 1048576),
        ("f32[1024,128]{1,0:T(8,128)}", 524288, 524288),
        ("f32[1024,128]{1,0}", 524288, 524288),
        ("pred[100]{0}", 100, 100),
        ("s4[5]{0}", 3, 3),
        ("f32[]", 4, 4),
    ],
)
def test_bytes_with_and_without_padding(text, size, padded):
    (array,) = arrays(text)
    assert (array.num_bytes, array.padded_bytes) == (size, padded)


def test_types_of_several_arrays():
    text = "(f32[2,3]{1,0}, s32[], /*index=2*/bf16[4]{0:T(8)S(5)}, token[])"
    assert [str(array) for array in arrays(text)] == ["f32[2,3]", "s32[]", "bf16[4]", "token[]"]
    assert [array.is_in_host_memory for array in arrays(text)] == [False, False, True, False]
    assert type_bytes(text) == 24 + 4 + 8
    assert Array("f32", (2, 3), "1,0").size == 6


def test_parts_are_split_outside_of_brackets():
    assert parts("f32[2,3]{1,0} %a, (s32[], f32[1]) %b, %c") == [
        "f32[2,3]{1,0} %a",
        "(s32[], f32[1]) %b",
        "%c",
    ]


def test_sources_runs_and_fusions_of_a_program():
    def looped(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) * 2 + 1, x)

    program = read_program(jax.jit(looped).lower(jnp.ones(300)).compile().as_text())
    places = list(walk(program))
    sines = [place for place in places if place.instruction.opcode == "sine"]
    assert sines and {place.runs for place in sines} == {7}
    assert program.source(sines[0].instruction).startswith("parallel/test_program_text.py:")
    assert any(place.is_fused for place in places) and not all(place.is_fused for place in places)
    assert "x" not in program.header and program.entry in program.computations


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("/a/ultramem_jax/ops/topk.py", "ultramem_jax/ops/topk.py:7"),
        ("/a/ultramem_jax/ultramem_jax/ops/topk.py", "ultramem_jax/ops/topk.py:7"),
        # A checkout may be called as the library is.
        ("/a/ultramem_jax/tests/ops/test_topk.py", "ops/test_topk.py:7"),
        ("/a/ultramem_jax/launch.py", "ultramem_jax/launch.py:7"),
    ],
)
def test_a_source_in_the_instruction_itself(file, source):
    text = (
        "HloModule m\n\nENTRY main {\n"
        '  ROOT p = f32[2]{0} parameter(0), metadata={op_name="x" '
        f'source_file="{file}" source_line=7}}\n'
        "}\n"
    )
    program = read_program(text)
    (place,) = walk(program)
    assert program.source(place.instruction) == source
    assert place.instruction.is_root and place.instruction.op_name == "x"


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        read_program("HloModule m\n")
