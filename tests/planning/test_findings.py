"""Findings come from lines of programs for H100 and TPU v5e, and from programs for CPU."""

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.parallel.program_text import read_program
from ultramem_jax.planning.findings import Findings, find

_SOURCE = 'metadata={op_name="OP" source_file="/a/ultramem_jax/ops/x.py" source_line=LINE}'
_REGIONS = """HloModule step, num_partitions=1

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%rounded (a: bf16[], b: bf16[]) -> bf16[] {
  %a.2 = bf16[] parameter(0)
  %b.2 = bf16[] parameter(1)
  %a.3 = f32[] convert(%a.2)
  %b.3 = f32[] convert(%b.2)
  %sum.2 = f32[] add(%a.3, %b.3)
  ROOT %result.2 = bf16[] convert(%sum.2)
}

%largest (a: f32[], b: f32[]) -> f32[] {
  %a.4 = f32[] parameter(0)
  %b.4 = f32[] parameter(1)
  ROOT %result.4 = f32[] maximum(%a.4, %b.4)
}

%pass (a: (s32[], f32[1000,64])) -> (s32[], f32[1000,64]) {
  ROOT %a.5 = (s32[], f32[1000,64]{1,0}) parameter(0)
}

%more (a: (s32[], f32[1000,64])) -> pred[] {
  %a.6 = (s32[], f32[1000,64]{1,0}) parameter(0)
  ROOT %b.6 = pred[] constant(false)
}

%second (a: f32[], b: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  ROOT %b.1 = f32[] parameter(1)
}

"""


def _program(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    parameters = [
        "%table = f32[1000,64]{1,0} parameter(0)",
        "%at = s32[50,1]{1,0} parameter(1)",
        "%rows = f32[50,64]{1,0} parameter(2)",
        "%scores = f32[70,640]{1,0} parameter(3)",
        "%words = u32[5000]{0} parameter(4)",
    ]
    head = "\n".join(f"  {line}" for line in parameters)
    return read_program(f"{_REGIONS}ENTRY %main (p: f32[]) -> f32[] {{\n{head}\n{body}\n}}\n")


def _at(op, line):
    return _SOURCE.replace("OP", op).replace("LINE", str(line))


def _found(*lines) -> Findings:
    return find(_program(*lines), [(1000, 64)])


def _what(findings):
    return [(one.what, one.source, one.times) for one in findings]


def test_sorts_of_rows_and_of_words():
    found = _found(
        "%s = (f32[70,640]{1,0}, s32[70,640]{1,0}) sort(%scores, %scores), dimensions={1}, "
        + _at("top_k", 3),
        "%w = u32[5000]{0} sort(%words), dimensions={0}, " + _at("sort", 4),
        '%k = (f32[70,16]{1,0}, s32[70,16]{1,0}) custom-call(%scores), custom_call_target="__gpu$TopK", '
        + _at("top_k", 5),
    )
    assert [(one.width, one.source) for one in found.sorts] == [
        (640, "ultramem_jax/ops/x.py:3"),
        (0, "ultramem_jax/ops/x.py:4"),
        (640, "ultramem_jax/ops/x.py:5"),
    ]
    assert [one.what for one in found.custom_calls] == ["__gpu$TopK"]


def test_scatters_by_kind():
    of = "scatter(%table, %at, %rows), update_window_dims={1}, inserted_window_dims={0}, to_apply="
    flags = "indices_are_sorted=true, unique_indices=true, "
    found = _found(
        f"%a = f32[1000,64]{{1,0}} {of}%add, " + _at("scatter-add", 1),
        f"%b = f32[1000,64]{{1,0}} {of}%add, {flags}" + _at("scatter-add", 2),
        f"%c = f32[1000,64]{{1,0}} {of}%second, " + _at("scatter", 3),
        f"%d = f32[1000,64]{{1,0}} {of}%second, indices_are_sorted=true, " + _at("scatter", 4),
        f"%e = s32[1000]{{0}} {of}%add, " + _at("scatter-add", 5),
        f"%f = bf16[1000,64]{{1,0}} {of}%rounded, " + _at("scatter-add", 6),
        f"%g = f32[1000,64]{{1,0}} {of}%largest, " + _at("scatter-max", 7),
        "%h = (s32[], f32[1000,64]{1,0}) while(%words), condition=%more, body=%pass, "
        + _at("jit(f)/scatter-add", 8),
    )
    assert [one.what for one in found.scatters] == [
        "atomic add to f32[1000,64]",
        "unique add to f32[1000,64]",
        "any order write to f32[1000,64]",
        "sorted write to f32[1000,64]",
        "any order add to s32[1000]",
        "atomic add to bf16[1000,64]",
        "atomic maximum to f32[1000,64]",
        "one by one, scatter-add",
    ]
    assert not found.table_copies  # all of these write in place


def test_copies_of_tables():
    found = _found(
        "%a = f32[1000,64]{1,0} copy(%table), " + _at("copy", 1),
        "%b = bf16[1000,64]{1,0} convert(%table), " + _at("convert_element_type", 2),
        "%c = f32[50,64]{1,0} copy(%rows), " + _at("copy", 3),
        "%d = (f32[1000,64]{1,0}, f32[1000,64]{1,0}, u32[]) copy-start(%table), " + _at("copy", 4),
        "%e = f32[1000,64]{1,0} copy-done(%d), " + _at("copy", 4),
        "%f = f32[1000,64]{1,0} bitcast(%table), " + _at("reshape", 5),
        '%g = f32[1000,64]{1,0} custom-call(%table), custom_call_target="x", '
        "output_to_operand_aliasing={{}: (0, {})}, " + _at("write", 6),
        # Of the same size by chance.
        "%h = pred[1000,64]{1,0} compare(%table, %table), direction=GT, " + _at("gt", 7),
        "%i = f32[64,1000]{1,0} negate(%scores), " + _at("neg", 8),
    )
    assert [(one.what, one.source[-1], one.times) for one in found.table_copies] == [
        ("copy f32[1000,64]", "1", 1),
        ("convert bf16[1000,64]", "2", 1),
        ("copy f32[1000,64]", "4", 1),
    ]
    moments = find(_program("%a = f32[1000]{0} negate(%rows), " + _at("neg", 1)), [(1000, 64), (1000,)])
    assert [one.what for one in moments.table_copies] == ["negate f32[1000]"]


def test_copies_of_large_tables_in_other_shapes():
    lines = (
        "%a = f32[64,20000]{1,0} transpose(%table), dimensions={1,0}, " + _at("transpose", 1),
        "%b = bf16[2500,8,64]{2,1,0} convert(%table), " + _at("convert_element_type", 2),
        "%c = f32[1280000]{0} copy(%table), " + _at("copy", 3),
        "%d = f32[20480,64]{1,0} pad(%table, %scores), padding=0_480x0_0, " + _at("pad", 4),
        "%e = f32[22000,64]{1,0} pad(%table, %scores), padding=0_2000x0_0, " + _at("pad", 5),
        "%f = s32[1280000]{0} negate(%words), " + _at("neg", 6),
    )
    found = find(_program(*lines), [(20_000, 64)])
    assert [(one.what, one.source[-1]) for one in found.table_copies] == [
        ("transpose f32[64,20000]", "1"),
        ("convert bf16[2500,8,64]", "2"),
        ("copy f32[1280000]", "3"),
        ("pad f32[20480,64]", "4"),
    ]


def test_gradients_of_all_rows_are_no_copy():
    found = find(
        _program(
            "%a = f32[1000,64]{1,0} gather(%scores, %at), slice_sizes={1,64}, " + _at("gather", 1),
            "%b = f32[1000,64]{1,0} transpose(%a), dimensions={0,1}, " + _at("gather", 2),
            "%c = f32[1000,64]{1,0} gather(%table, %at), slice_sizes={1,64}, " + _at("gather", 3),
            "%d = f32[1000,64]{1,0} add(%a, %a), " + _at("add", 4),
        ),
        [(1000, 64)],
    )
    assert [one.source[-1] for one in found.table_copies] == ["3", "4"]


def test_solvers():
    found = _found(
        '%s = (f32[2,2]{1,0}, s32[]) custom-call(%rows), custom_call_target="cusolver_gesvdj_ffi", '
        + _at("jit(f)/svd", 1),
        "%t = f32[2,2]{1,0} get-tuple-element(%s), index=0, " + _at("jit(f)/svd", 2),
        "%q = f32[2,2]{1,0} fusion(%rows), kind=kLoop, " + _at("jit(f)/householder_product", 3),
        "%e = f32[2,2]{1,0} fusion(%rows), kind=kLoop, " + _at("jit(f)/eig", 4),
        "%n = f32[2,2]{1,0} fusion(%rows), kind=kLoop, " + _at("jit(f)/weight", 5),
    )
    assert [one.source[-1] for one in found.solvers] == ["1", "3", "4"]


def test_ragged_products():
    found = _found(
        # XLA for an H100 made this of ragged_dot(x[64,32], w[4,32,16]): rows times all groups side by side.
        "%r = bf16[64,16]{1,0} dot(%rows, %rows), lhs_contracting_dims={1}, "
        + _at("jit(f)/ragged_dot_general", 1),
        "%w = bf16[4,32,16]{2,1,0} dot(%rows, %rows), lhs_contracting_dims={1}, "
        + _at("jit(f)/transpose(jvp())/ragged_dot_general", 2),
        '%g = (f32[50,8]{1,0}, s8[4]) custom-call(%rows), custom_call_target="__cublas$gemm", '
        + _at("jit(f)/ragged_dot_general", 3),
        # Kernels: of the TPU's compiler, and of tokamax.
        '%t = f32[50,8]{1,0} custom-call(%rows), custom_call_target="tpu_custom_call", '
        + _at("ragged_dot_general", 4),
        '%k = f32[50,8]{1,0} custom-call(%rows), custom_call_target="__gpu$xla.gpu.triton", '
        + _at("jit(ragged_dot)/pallas_call", 5),
        "%n = f32[50,8]{1,0} dot(%rows, %rows), lhs_contracting_dims={1}, "
        + _at("ragged_dot/dot_general", 6),
    )
    assert [(one.what, one.source[-1]) for one in found.dense_ragged] == [
        ("dot bf16[64,16]", "1"),
        ("dot bf16[4,32,16]", "2"),
        ("__cublas$gemm f32[50,8]", "3"),
    ]


def test_transfers_to_the_host():
    found = _found(
        '%h = () custom-call(%rows), custom_call_target="xla_ffi_python_gpu_callback", ' + _at("callback", 1),
        "%m = f32[50,64]{1,0:S(5)} copy(%rows), " + _at("copy", 2),
        "%l = f32[50,64]{0,1} copy(%rows), " + _at("copy", 3),
        "%i = s32[] copy(%at), " + _at("copy", 4),
        "%g = f32[50,64]{1,0} gather(%m, %at), " + _at("gather", 5),
        "%s = (f32[50,64]{1,0}, u32[], token[]) send(%rows), channel_id=1, " + _at("send", 6),
        "%t = (f32[50,64]{1,0}, u32[], token[]) send(%rows), channel_id=2, is_host_transfer=true, "
        + _at("send", 7),
    )
    assert [one.source[-1] for one in found.host_transfers] == ["1", "2", "5", "7"]


def test_kernels_are_counted_at_their_start():
    found = _found(
        "%a = (f32[50,64]{1,0}, f32[50,64]{1,0}) all-gather-start(%rows), dimensions={0}, " + _at("x", 1),
        "%b = f32[50,64]{1,0} all-gather-done(%a), " + _at("x", 1),
        '%c = s32[50,1]{1,0} custom-call(%at), custom_call_target="AssumeGatherIndicesInBound", '
        + _at("x", 2),
        "%d = f32[50,64]{1,0} negate(%rows), " + _at("neg", 3),
    )
    assert found.kernels == 2 and not found.custom_calls


def test_padded_arrays():
    found = _found(
        "%a = f32[4096,16]{1,0:T(8,128)} negate(%rows), " + _at("neg", 1),
        "%b = f32[4096,128]{1,0:T(8,128)} negate(%rows), " + _at("neg", 2),
        "%c = f32[8,2]{1,0:T(8,128)} negate(%rows), " + _at("neg", 3),
    )
    assert _what(found.padded) == [("f32[4096,16]{1,0:T(8,128)}: 8 times", "ultramem_jax/ops/x.py:1", 1)]


def test_programs_for_cpu():
    def step(table, at, rows, x, order):
        x = jax.lax.fori_loop(0, x.shape[0], lambda i, x: x.at[i].mul(2.0), x)
        x = jax.lax.while_loop(lambda x: x.sum() < order, lambda x: x * 2, x)
        return table.at[at].add(rows), jnp.sort(x.reshape(4, -1), axis=1)

    arguments = jnp.zeros((1000, 64)), jnp.zeros((50,), jnp.int32), jnp.ones((50, 64)), jnp.ones(40), 1e9
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    found = find(read_program(compiled.as_text()), [(1000, 64)])
    assert len(found.unbounded_loops) == 1  # the other one has a count
    assert [sort.width for sort in found.sorts] == [10]
    assert found.sorts[0].source.startswith("planning/test_findings.py:")
    assert found.kernels > 40  # the first loop's body runs 40 times
    atomic = [one for one in found.scatters if one.what.startswith("atomic")]
    assert len(atomic) + len(found.unbounded_loops) >= 1  # XLA on CPU may write the scatter as a loop
    assert np.isfinite(found.kernels)
