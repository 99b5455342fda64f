import json
import math
import resource
import signal

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.training.metrics import MetricWriter, _running_mean, flatten, plot_loss_curve, read_metrics


def test_flatten_joins_names_and_takes_scalars_of_every_kind():
    tree = {
        "loss": jnp.float32(0.5),
        "memory_0": {"slots_read_share": np.float64(0.25), "reads": (jnp.int32(7),)},
        "done": True,
    }
    flat = flatten(tree)
    assert flat == {"loss": 0.5, "memory_0/slots_read_share": 0.25, "memory_0/reads": 7, "done": 1}
    assert [type(value) for value in flat.values()] == [float, float, int, int]


@pytest.mark.parametrize("value", [jnp.zeros(2), "text", None, [1, 2]])
def test_flatten_refuses_what_is_no_scalar(value):
    with pytest.raises(ValueError, match=r"metric 'a/b' is not a scalar"):
        flatten({"a": {"b": value}})


def test_flatten_refuses_two_of_a_name():
    with pytest.raises(ValueError, match="two metrics are named 'a/b'"):
        flatten({"a": {"b": 1}, "a/b": 2})


def test_each_record_is_on_disk_when_written_and_is_strict_json(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": math.nan, "memory_0": {"usage": -math.inf}, "z": math.inf})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

        def refuse(constant):
            raise AssertionError(constant)

        assert [json.loads(line, parse_constant=refuse) for line in lines] == [
            {"step": 1, "split": "train", "loss": "NaN", "memory_0/usage": "-Infinity", "z": "Infinity"}
        ]
        (record,) = read_metrics(writer.path)
    assert math.isnan(record["loss"])
    assert (record["memory_0/usage"], record["z"]) == (-math.inf, math.inf)


def test_reserved_names_are_refused(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"\['step'\] are taken"):
        writer.write(1, "train", {"step": 2})


def test_resume_drops_later_steps_and_a_half_written_line(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, "train", {"loss": float(step)})
            writer.write(step, "validation", {"loss": math.inf})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "spl')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6

    with MetricWriter(tmp_path, resume_step=20) as writer:
        writer.write(30, "train", {"loss": 31.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["split"], record["loss"]) for record in records] == [
        (10, "train", 10.0),
        (10, "validation", math.inf),
        (20, "train", 20.0),
        (20, "validation", math.inf),
        (30, "train", 31.0),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_run_from_its_start_begins_a_new_file_and_resuming_needs_none(tmp_path):
    for resume_step in (None, None, 5):
        with MetricWriter(tmp_path / "new", resume_step=resume_step) as writer:
            writer.write(1, "train", {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [1, 1]


NO_RECORDS = [
    "broken",
    "\0" * 300,
    "[1]",
    "null",
    "[" * 100_000,
    "7",
    '"step"',
    '{"split": "train", "loss": 1.0}',
    '{"step": "2", "split": "train"}',
    '{"step": 2.5, "split": "train"}',
    '{"step": true, "split": "train"}',
    '{"step": 2}',
    '{"step": 2, "split": 3}',
    '{"step": 2, "split": "train", "loss": null}',
    '{"step": 2, "split": "train", "loss": [1.0]}',
    '{"step": 2, "split": "train", "loss": "much"}',
]


@pytest.mark.parametrize("end", ["", "\0\0\0\0", "\0\n", '{"step": 4, "spl'])
def test_what_is_no_record_is_passed_over_and_said_once(tmp_path, caplog, end):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": step, "split": "train", "loss": 1.0} for step in (1, 3)]
    first, last = map(json.dumps, good)
    path.write_text("\n".join([first, *NO_RECORDS, last]) + "\n" + end)
    assert read_metrics(path) == good
    (warning,) = [record.getMessage() for record in caplog.records]
    bad = len(NO_RECORDS) + end.count("\n")
    assert warning == f"{path}: passing over {bad} lines that are no records, line 2 first"
    caplog.clear()
    with MetricWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, "train", {"loss": 2.0})
    assert len(caplog.records) == 1
    assert read_metrics(path) == [good[0], {"step": 3, "split": "train", "loss": 2.0}]


def test_a_step_that_is_evaluated_again_loses_its_old_record(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2):
            for split in ("train", "validation"):
                writer.write(step, split, {"loss": 1.0})
    with MetricWriter(tmp_path, resume_step=2, without_validation=True):
        pass
    kept = [(record["step"], record["split"]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [(1, "train"), (1, "validation"), (2, "train")]


def test_a_disk_that_is_full_for_a_while_stops_nothing(tmp_path, caplog):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1.0})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 5, limits[1]))
        try:
            for step in range(2, 600):
                writer.write(step, "train", {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        writer.write(600, "train", {"loss": 1.0})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == f"{writer.path}: metrics cannot be written: File too large"
    assert [record["step"] for record in read_metrics(writer.path)] == list(range(1, 601))


def test_tensorboard_files_hold_the_scalars(tmp_path):
    with MetricWriter(tmp_path, tensorboard=True) as writer:
        writer.write(3, "train", {"memory_0": {"usage": 0.5}})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/memory_0/usage" in events.read_bytes()


def test_running_mean_by_hand():
    assert _running_mean([1.0, 3.0, math.nan, 5.0], 2) == [1.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize("num_records", [20, 400])
def test_loss_curve_draws_both_colours_and_leaves_no_global_state(tmp_path, num_records):
    import matplotlib as mpl
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    before = dict(mpl.rcParams)
    with MetricWriter(tmp_path) as writer:
        for step in range(1, num_records + 1):
            writer.write(step, "train", {"bits_per_byte": math.nan if step == 5 else 8 / step**0.3})
            if step % 10 == 0:
                writer.write(step, "validation", {"bits_per_byte": 8.2 / step**0.3})
    picture = tmp_path / "figures" / "loss.png"
    plot_loss_curve(writer.path, picture, "A run")
    pixels = imread(picture)[..., :3]
    chex.assert_shape(pixels, (750, 1200, 3))
    for colour in ("#4c78a8", "#e4572e"):
        distance = np.abs(pixels - np.asarray(to_rgb(colour), np.float32)).max(axis=-1)
        assert (distance < 0.02).sum() > 100
    assert dict(mpl.rcParams) == before


def test_loss_curve_says_when_there_is_nothing_to_draw(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1.0})
    with pytest.raises(ValueError, match="has the metric 'bits_per_byte'"):
        plot_loss_curve(writer.path, tmp_path / "loss.png", "A run")
