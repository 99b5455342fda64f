"""`plan`: bytes, collectives and time of a step on simulated devices, and which partition is cheaper."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from experiments.configs import slots_1b
from ultramem_jax import MeshConfig, ModelConfig, RunConfig, TrainConfig, UserError
from ultramem_jax.accounting import Transfer, exchange_bytes
from ultramem_jax.config import DataConfig, to_dict
from ultramem_jax.parallel.collectives import Collective
from ultramem_jax.planning import tables
from ultramem_jax.planning.baseline import baseline_run, describe_baseline
from ultramem_jax.planning.compiled_step import (
    DeviceBytes,
    abstract_axes,
    compile_step,
    resolved,
    simulated_devices,
)
from ultramem_jax.planning.hardware import HARDWARE, Hardware, load_hardware
from ultramem_jax.planning.partition import crossover, partition_costs, verdict
from ultramem_jax.planning.plans import lookups, planned_runs
from ultramem_jax.planning.step_time import (
    access_bytes,
    estimate_step,
    row_traffic,
    step_flops,
    touched_bytes,
    within_node,
)
from ultramem_jax.planning.traffic import grouped, purpose, traffic
from ultramem_jax.presets import families, preset

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=24,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=32,
    memories={
        "memory": families.ultramem(
            placement="1:1", num_keys=16, top_m=4, num_heads=1, key_dim=8, value_dim=8, query_conv_width=4
        )
    },
)
TINY = RunConfig(
    MODEL,
    data=DataConfig(seq_len=16),
    train=TrainConfig(batch_size=8),
    mesh=MeshConfig(data=2, memory=4),
)
ROUND = Hardware(
    name="round numbers",
    bf16_flops=2e9,
    fp32_flops=1e6,
    memory_bytes=1e6,
    memory_bytes_per_second=1e3,
    access_bytes=32,
    node_link_bytes=100,
    outer_link_bytes=10,
    devices_per_node=4,
)
# TINY's dense parameters: embedding 24·16, attention 4·16², MLP 2·16·32, norms 3·16; of the memory queries
# 16·2·8, keys 2·32·8, norms 2·8, cores 2·4, projection 4·8·16, convolution 16·4.
DENSE = 384 + 1024 + 1024 + 48 + 256 + 512 + 16 + 8 + 512 + 64


def by(partition, config=TINY):
    memory = config.model.memory.changed(partition=partition)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memories={"memory": memory}))


@pytest.fixture(scope="module")
def compiled():
    return compile_step(TINY)


# ---- what a device holds


def test_bytes_per_device_are_those_of_the_shards(compiled):
    held = compiled.bytes
    assert held.parameters == 4 * DENSE
    assert held.tables == 256 * 8 * 4 // 4
    assert held.row_moments == 2 * held.tables
    assert held.slots_seen == 256 // 4 + 4  # and their number
    assert held.batch == 8 * 17 * 4 // 8
    # Two moments of every parameter, and the optimizer's counts of steps.
    assert held.optimizer - 8 * DENSE in (4, 8, 12)
    assert held.on_host == 0
    assert compiled.gathered_parameters == held.parameters


def test_the_compiler_counts_the_same_arguments(compiled):
    assert compiled.bytes.arguments == compiled.argument_bytes
    assert compiled.bytes.temporaries > 0
    assert compiled.bytes.total == compiled.bytes.arguments + compiled.bytes.temporaries


def test_it_fits_as_long_as_the_memory_is_large_enough(compiled):
    total = compiled.bytes.total
    exact, less = (dataclasses.replace(ROUND, memory_bytes=size) for size in (total, total - 1))
    assert tables.fits(compiled.bytes, exact) and not tables.fits(compiled.bytes, less)


# ---- what devices send each other


def test_collectives_equal_their_formulas_by_purpose(compiled):
    rows = {row.purpose: row for row in traffic(compiled) if row.formula_bytes is not None}
    assert set(rows) == {
        "reads to owners",
        "scores to owners",
        "pooled sums to tokens",
        "cotangents to owners",
        "score gradients to tokens",
        "reads and cotangents to replicas",
        "gradients of parameters",
    }
    for row in rows.values():
        # Metrics may travel with the gradients.
        assert row.compiled_bytes == pytest.approx(row.formula_bytes, rel=0.01), row
    # 64 tokens of a group, 4 reads of 4 bytes and one for the block; from 4 devices to 4.
    assert rows["reads to owners"].compiled_bytes == 64 * 4 * (4 + 1) * 3 // 4
    assert rows["gradients of parameters"].axes == ("data", "memory")


def collective(op_name, kind="all-gather", axes=("memory",), **fields):
    values = {
        "group_size": 4,
        "operand_bytes": 400,
        "result_bytes": 1600,
        "loop_trip_count": 1,
        "in_loop": False,
        "trips_known": True,
    }
    return Collective(kind=kind, axes=axes, op_name=op_name, **(values | fields))


FORWARD, BACKWARD = "jit(f)/jvp(Transformer)", "jit(f)/transpose(jvp(Transformer))"


@pytest.mark.parametrize(
    ("path", "kind", "axes", "expected"),
    [
        (
            f"{FORWARD}/memory_0/shard_map/exchange(scores to owners)/all_gather",
            "all-gather",
            "memory",
            "scores to owners",
        ),
        (
            f"{BACKWARD}/shard_map/transpose(jvp(exchange(tokens to experts and back)))/all_to_all",
            "all-to-all",
            "memory",
            "tokens to experts and back",
        ),
        (
            f"{BACKWARD}/(exchange(gradients of parameters)/psum:layer_1/dot_general)",
            "all-reduce",
            "data",
            "gradients of parameters",
        ),
        ("exchange(a)/psum:exchange(b)/psum:exchange(a)/psum", "all-reduce", "data", "a and b"),
        (f"{FORWARD}/layer_1/feed_forward/dot_general", "all-reduce", "tensor", "activations over tensor"),
        ("jit(f)/jvp()/sharding_constraint", "all-gather", "fsdp", "parameters for the step"),
        (f"{BACKWARD}/layer_1/dot_general", "all-reduce", "data", "gradients of parameters"),
        ("jit(f)/reduce_sum", "all-reduce", "data", "losses and metrics"),
    ],
)
def test_the_purpose_is_read_from_the_name_of_the_exchange(path, kind, axes, expected):
    assert purpose(collective(path, kind, (axes,))) == expected


def test_loops_of_unknown_length_are_counted_by_the_reads():
    loop = collective(
        "jit(f)/while/body/exchange(means over the columns of rows)/psum",
        "all-reduce",
        in_loop=True,
        trips_known=False,
        operand_bytes=400,
    )
    (row,) = grouped([loop], [], reads=1001)
    # 100 rows a pass: 11 passes, each of which sends 2·400·3/4 bytes.
    assert (row.times, row.compiled_bytes, row.sent_bytes) == (None, 11 * 600, 6600.0)
    overflow = dataclasses.replace(loop, op_name=f"{FORWARD}/while/body/exchange(overflow of experts)/psum")
    assert [row.compiled_bytes for row in grouped([overflow], [])] == [0]


def test_formulas_stand_beside_what_they_describe():
    experts = f"{FORWARD}/shard_map/exchange(tokens to experts and back)/all_to_all"
    found = [collective(experts, "all-to-all"), collective(experts, "all-to-all")]
    formulas = [
        Transfer("tokens to experts", "all-to-all", ("memory",), 200.0),
        Transfer("results to tokens", "all-to-all", ("memory",), 100.0),
        Transfer("gradients of parameters", "all-reduce", ("data",), 700.0),
    ]
    first, second = grouped(found, formulas)
    assert (first.purpose, first.times, first.compiled_bytes) == ("gradients of parameters", None, None)
    assert (second.times, second.compiled_bytes, second.formula_bytes) == (2, 600, 300.0)
    assert second.sent_bytes == 300.0


# ---- the time of a step


def test_flops_are_shared_by_tokens_owners_and_tensor():
    # Per token: attention 2·4·16², MLP 2·2·16·32, attention scores 2·16·17; logits 2·16·24; of the memory
    # query 2·(256 + 64), keys 2·512, scoring 4·2·32 + 2·4·4 + 2·2·16 + 2·4·12, projection 2·512, lookup
    # 2·4·8.
    shared, logits, memory, lookup = 2048 + 2048 + 544, 768, 640 + 1024 + 448 + 1024, 64
    flops = step_flops(TINY, abstract_axes(TINY))
    assert flops == 3 * (16 * (shared + logits + memory) + 128 / 2 / 4 * lookup)
    mesh = MeshConfig(data=2, tensor=2, memory=2, batch_over_memory=False)
    config = dataclasses.replace(TINY, mesh=mesh)
    flops = step_flops(config, abstract_axes(config))
    assert flops == 3 * (64 * (shared / 2 + logits / 2 + memory) + 128 / 2 / 2 * lookup)


def test_narrow_columns_cost_a_whole_access():
    assert [access_bytes(of_row, 32) for of_row in (128, 40, 32, 2)] == [128, 64, 32, 32]
    axes = abstract_axes(by("slots"))
    whole_rows, updated = row_traffic(by("slots"), axes, 32)
    # 128 tokens read 4 rows of 32 bytes each, from 2 groups of 4 owners.
    assert whole_rows == 128 * 4 // 8 * 32
    # 64 rows and their two moments, of which 128 reads touch so many.
    assert updated == pytest.approx(3 * 2 * 64 * (1 - (63 / 64) ** 128) * 32)
    columns = by("width")
    axes = abstract_axes(columns)
    assert row_traffic(columns, axes, 8)[0] == whole_rows
    assert row_traffic(columns, axes, 32)[0] == 4 * whole_rows
    # In the order of the rows, four of 8 bytes share an access: 64 of these, 512 reads.
    assert row_traffic(columns, axes, 32)[1] == pytest.approx(6 * 64 * (1 - (63 / 64) ** 512) * 32)


def test_one_moment_per_row_costs_an_access_too():
    train = dataclasses.replace(TINY.train, row_second_moment="row", row_moment_dtype="bfloat16")
    config = dataclasses.replace(TINY, train=train)
    updated = row_traffic(config, abstract_axes(config), 32)[1]
    sizes = [touched_bytes(of_row, 64, 128, 32) for of_row in (32, 16, 4)]
    assert sizes[1] == pytest.approx(32 * (1 - (31 / 32) ** 128) * 32)
    assert sizes[2] == pytest.approx(8 * (1 - (7 / 8) ** 128) * 32)
    assert updated == pytest.approx(2 * sum(sizes))


def test_the_dense_way_updates_the_whole_table():
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, table_gradient="dense"))
    assert row_traffic(config, abstract_axes(config), 32)[1] == 7 * 4 * 8 * 64
    adagrad = dataclasses.replace(config.train, row_optimizer="adagrad_row")
    config = dataclasses.replace(config, train=adagrad)
    assert row_traffic(config, abstract_axes(config), 32)[1] == (3 * 4 * 8 + 2 * 4) * 64


def test_a_rule_that_keeps_nothing_moves_rows_alone():
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, row_optimizer="sgd"))
    updated = row_traffic(config, abstract_axes(config), 32)[1]
    assert updated == pytest.approx(2 * touched_bytes(32, 64, 128, 32))


def test_an_estimate_has_the_parts_of_a_step_and_two_bounds():
    axes = abstract_axes(TINY)
    state = DeviceBytes(1000, 2000, 0, 0, 0, 0, 0, 0)
    sent = {("memory",): 5000.0, ("data",): 200.0, ("data", "memory"): 100.0}
    estimate = estimate_step(TINY, axes, ROUND, state, 3000, sent)
    seconds = {part.name: part.seconds for part in estimate.parts}
    looked_up, updated = row_traffic(TINY, axes, 32)
    assert seconds == {
        "compute": step_flops(TINY, axes) / 1e6,
        "parameters and AdamW": (2 * 3000 + 7 * 1000) / 1e3,
        "rows, forward and backward": 2 * looked_up / 1e3,
        "update of rows": updated / 1e3,
        "sent along memory": 50.0,  # within a node
        "sent along data": 20.0,
        "sent along data × memory": 10.0,
    }
    assert estimate.by_resource["links between nodes"] == 30.0
    assert estimate.overlapped == 50.0
    assert estimate.sequential == pytest.approx(sum(seconds.values()))
    assert estimate.tokens == 128


def test_bfloat16_has_its_own_rate():
    axes = abstract_axes(TINY)
    half = dataclasses.replace(TINY, model=dataclasses.replace(MODEL, dtype="bfloat16"))
    state = DeviceBytes(0, 0, 0, 0, 0, 0, 0, 0)
    ratio = [estimate_step(run, axes, ROUND, state, 0, {}).parts[0].seconds for run in (TINY, half)]
    assert ratio[0] / ratio[1] == pytest.approx(2000)


def test_minor_axes_lie_within_a_node():
    sizes = {"data": 4, "tensor": 2, "memory": 8}
    assert within_node(sizes, ("memory",), 8) and within_node(sizes, ("tensor", "memory"), 16)
    assert not within_node(sizes, ("memory",), 4) and not within_node(sizes, ("tensor",), 8)
    assert not within_node(sizes, ("data",), 16) and within_node(sizes, ("data",), 64)
    assert not within_node(sizes, (), 8) and within_node(sizes, (), 64)


# ---- by slots or by width


def test_the_paper_sends_less_from_the_parts_on_that_the_formulas_say():
    site = slots_1b.get_config().model.sites[0]
    costs = partition_costs(site, 4096, HARDWARE["h100"], 256)
    assert list(costs) == [2, 4, 8, 16, 32, 64, 128, 256]
    assert "width" in costs[64] and "width" not in costs[128]  # of 64 columns
    # (P-1)/P·R·(4 + b·d_v) < (P-1)·(R·(5 + h·b) + E·d_v·b) where P > 32·132 / (32·9 + 512) = 5.3; and by
    # width where (P-1)·R·9 + (P-1)/P·512 is more: P > (32·132 - 512) / (32·9) = 12.9.
    assert crossover(costs, "paper_number_wise", "slots", lambda cost: cost.sent) == 8
    assert crossover(costs, "paper_number_wise", "width", lambda cost: cost.sent) == 16
    assert crossover(costs, "slots", "width", lambda cost: cost.sent) is None
    assert crossover(costs, "width", "slots", lambda cost: cost.sent) == 2
    assert costs[8]["slots"].sent == exchange_bytes(site, 4096, 8).slots == 7 * 4096 * 800
    words = verdict(costs)
    assert "`paper, by dimension` for P = 2 to 16" in words and "from P = 32 on" in words


def test_below_the_smallest_access_width_reads_more_with_every_part():
    costs = partition_costs(slots_1b.get_config().model.sites[0], 4096, HARDWARE["h100"], 64)
    reads = 4096 * 32
    assert {parts: ways["slots"].read for parts, ways in costs.items()} == dict.fromkeys(costs, reads * 128)
    # Rows of 128 bytes in 4 parts are accesses of 32; in 64 parts 2 bytes cost as much.
    assert [costs[parts]["width"].read / (reads * 128) for parts in costs] == [1, 1, 2, 4, 8, 16]
    cost = costs[64]["width"]
    assert cost.seconds == pytest.approx(cost.sent / 50e9 + cost.read / 3.35e12)
    assert costs[8]["slots"].seconds == pytest.approx(costs[8]["slots"].sent / 450e9 + reads * 128 / 3.35e12)


# ---- a baseline


def test_the_experts_of_a_rival_divide_over_the_devices():
    config = RunConfig(preset("ultramem-tiny"), mesh=MeshConfig(data=1, memory=4))
    baseline = baseline_run(config, "moe")
    moe = baseline.model.moe
    # The match has 34 experts of width 376.
    assert (moe.num_experts, moe.expert_dim, baseline.mesh.memory) == (32, 376, 4)
    words = describe_baseline(config, baseline)
    assert "32 experts of width 376" in words and "sparse parameters 6." in words
    memory = config.model.memory.changed(partition="both")
    both = RunConfig(
        dataclasses.replace(config.model, memories={"memory": memory}),
        mesh=MeshConfig(data=1, memory=2, width=8),
    )
    assert baseline_run(both, "moe").mesh == MeshConfig(data=1, memory=16)


# ---- the command


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.py"
    text = "from ultramem_jax.config import *\ndef get_config():\n    return run_config_from_dict({!r})\n"
    path.write_text(text.format(to_dict(TINY)))
    return path


def test_the_plan_is_printed_and_written(run, compiled, tiny_file, tmp_path):
    out = tmp_path / "plans" / "tiny.md"
    status, printed, err = run("plan", f"--config={tiny_file}", f"--out={out}")
    assert status == 0, err
    text = out.read_text()
    assert text in printed
    assert text.startswith("# Plan: tiny on data:2,memory:4 (8 × H100 SXM)\n")
    lines = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        lines.setdefault(cells[0], cells[1:])
    assert lines["parameters"] == [f"{4 * DENSE:,}"]
    assert lines["tables"] == ["2,048"] and lines["row moments"] == ["4,096"]
    assert lines["total"] == [f"{compiled.bytes.total:,}"] and lines["fits"] == ["yes"]
    assert lines["reads to owners"] == ["all-gather", "memory", "4", "2", "960", "960", "1.000"]
    assert lines["compute"][:2] == ["compute", "TFLOP"]
    assert "not a measurement" in text and "launch.py plan" in text
    numbers = json.loads(out.with_suffix(".json").read_text())
    of_plan = numbers["plans"]["slots"]
    assert of_plan["bytes"] == dataclasses.asdict(compiled.bytes)
    assert of_plan["config"]["mesh"]["memory"] == 4 and list(numbers["partition"]) == ["2", "4", "8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware=h10"], "unknown hardware 'h10': did you mean 'h100'?"),
        (["--hardware=nowhere.json"], "--hardware = 'nowhere.json': there is no such file"),
        (["--out=plan.txt"], "--out = 'plan.txt': must be the name of a .md file"),
        (["--partition=slot"], "unknown --partition 'slot': did you mean 'slots'?"),
        (["--baseline=mo"], "unknown --baseline 'mo': did you mean 'moe'?"),
        (["--config.mesh.memory=3"], "mesh.memory = 3: must divide num_slots of a table = 256"),
        (
            ["--partition=width", "--config.mesh.memory=16"],
            "mesh.memory = 16: must divide model.memories.memory.table.value_",
        ),
        (["--config.mesh.data=3"], "train.batch_size = 8: a micro-batch of 8 sequences does not divide"),
        (
            ["--config.mesh.data=64", "--config.train.batch_size=512"],
            "mesh: makes 256 devices, and JAX has been started with 8 (cpu)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(run, tiny_file, arguments, said):
    status, out, err = run("plan", f"--config={tiny_file}", *arguments)
    error = err.splitlines()[-1]
    assert (status, out) == (2, "") and error.startswith(f"error: {said}"), err
    assert len([line for line in err.splitlines() if not line.startswith("compiling")]) == 1


def test_a_model_without_memories_has_no_partition():
    config = RunConfig(preset("dense-tiny"), mesh=MeshConfig(data=8))
    assert list(planned_runs(config, "", "")) == ["model"]
    assert lookups(config, ROUND) is None
    with pytest.raises(UserError, match="--partition = 'width': must be empty for a model without memories"):
        planned_runs(config, "width", "")
    with pytest.raises(UserError, match="the base must have a memory"):
        planned_runs(config, "", "moe")


def test_a_mesh_of_unknown_size_has_one_device_along_data():
    assert resolved(RunConfig()).mesh == MeshConfig(data=1)
    assert isinstance(abstract_axes(RunConfig()).mesh, AbstractMesh)


def test_devices_are_simulated_where_jax_has_not_been_used():
    assert len(simulated_devices(2)) == 2 and len(jax.devices()) == 8
    script = "from ultramem_jax.planning.compiled_step import simulated_devices as s; print(len(s(12)), s(12)[0].platform)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["12", "cpu"], done.stderr


# ---- hardware


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
