"""A config holds what its annotations say, whatever it is made of; or it is refused, by name, in a line."""

import dataclasses
import enum
import json
import math
import pathlib
from fractions import Fraction

import numpy as np
import pytest

from ultramem_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
    run_config_from_dict,
    to_dict,
)
from ultramem_jax.config.memory_kinds import ADDRESSERS, READOUTS
from ultramem_jax.config.memory_parts import TableConfig
from ultramem_jax.errors import UserError
from ultramem_jax.models.sampling import Sampling
from ultramem_jax.parallel.distributed import Membership
from ultramem_jax.presets import families

PARTS = (ADDRESSERS["product_keys"], TableConfig, READOUTS["projection"])
CONFIGS = (*PARTS, ModelConfig, MoEConfig, DataConfig, TrainConfig, MeshConfig, RunConfig, Sampling)


def refused(make, name, value, allowed):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == f"{name} = {value!r}: must be {allowed}"


@pytest.mark.parametrize(
    "cls, field, value, allowed",
    [
        (TrainConfig, "steps", 2.5, "a whole number"),
        (TrainConfig, "steps", True, "a whole number"),
        (TrainConfig, "steps", "2", "a whole number"),
        (TrainConfig, "steps", None, "a whole number"),
        (TrainConfig, "seed", 1.7, "a whole number"),
        (TrainConfig, "batch_size", 2.0, "a whole number"),
        (TrainConfig, "checkpoint_every", 2.5, "a whole number"),
        (TrainConfig, "learning_rate", "0.1", "a number"),
        (TrainConfig, "learning_rate", False, "a number"),
        (TrainConfig, "learning_rate", 1j, "a number"),
        (TrainConfig, "tensorboard", 1, "True or False"),
        (TrainConfig, "tensorboard", np.bool_(True), "True or False"),
        (PARTS[0], "softmax", "False", "True or False"),
        (PARTS[0], "num_keys", 32.0, "a whole number"),
        (PARTS[0], "init", None, "a string"),
        (ModelConfig, "tie_embeddings", "no", "True or False"),
        (ModelConfig, "moe", 5, "of the type MoEConfig"),
        (ModelConfig, "memories", 5, "of the type Mapping"),
        (ModelConfig, "mlp", b"gelu", "a string"),
        (ModelConfig, "mlp", pathlib.Path("gelu"), "a string"),
        (MoEConfig, "top_k", 1.0, "a whole number"),
        (MoEConfig, "normalize_gates", None, "True or False"),
        (DataConfig, "path", b"/text", "a string"),
        (DataConfig, "path", 3, "a string"),
        (MeshConfig, "data", 1.0, "a whole number"),
        (MeshConfig, "batch_over_memory", 0, "True or False"),
        (RunConfig, "model", None, "of the type ModelConfig"),
        (RunConfig, "train", {"steps": 3}, "of the type TrainConfig"),
        (Sampling, "top_k", 1.5, "a whole number"),
        (Sampling, "temperature", "1", "a number"),
    ],
)
def test_a_value_of_another_type_is_refused(cls, field, value, allowed):
    refused(lambda: cls(**{field: value}), cls.PREFIX + field, value, allowed)


def test_so_it_is_for_every_field():
    """Whatever is added to a config later is checked, too."""

    class Strange:
        def __repr__(self):
            return "strange"

    for cls in CONFIGS:
        for field in dataclasses.fields(cls):
            with pytest.raises(UserError, match=rf"^{cls.PREFIX}{field.name} = strange: must be "):
                cls(**{field.name: Strange()})


THOUSANDS_OF_DIGITS = pytest.param(10**5000, id="of thousands of digits")  # Python does not write them


@pytest.mark.parametrize("value", [2**32, 10**12, 2**63, -(10**12), np.int64(-(2**63)), THOUSANDS_OF_DIGITS])
def test_no_whole_number_takes_more_than_32_bits(value):
    for cls in CONFIGS:
        for field in dataclasses.fields(cls):
            if field.type is int:
                with pytest.raises(UserError, match=rf"^{cls.PREFIX}{field.name} = .*: must be below 2"):
                    cls(**{field.name: value})


HUGE = [math.inf, -math.inf, math.nan, 1e39, -(10**39), Fraction(10**400, 3), np.float16("inf")]


@pytest.mark.parametrize("value", [*HUGE, 10**400, THOUSANDS_OF_DIGITS])
def test_every_float_is_finite_also_in_float32(value):
    for cls in CONFIGS:
        for field in dataclasses.fields(cls):
            if field.type is float:
                with pytest.raises(UserError, match=rf"^{cls.PREFIX}{field.name} = .*finite"):
                    cls(**{field.name: value})


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: TrainConfig(eps=1e30), "train.eps"),
        (lambda: TrainConfig(eps=0.0), "train.eps"),
        (lambda: TrainConfig(eps=1e-50), "train.eps"),
        (lambda: ModelConfig(norm_eps=2.0), "model.norm_eps"),
        (lambda: ModelConfig(rope_theta=1e13), "model.rope_theta"),
        (lambda: ModelConfig(vocab_size=10**11), "model.vocab_size"),
        (lambda: ModelConfig(num_layers=10**9), "model.num_layers"),
        (lambda: families.ultramem(query_conv_width=10**6), "address.query_conv_width"),
        (lambda: families.ultramem(tucker_rank=10**5, rank_keys="full"), "address.tucker_rank"),
        (lambda: families.ultramem(tucker_rank=64, rank_keys="full"), "address.tucker_rank"),
        (lambda: families.ultramem(expansion=31622**2), "address.expansion"),
        (lambda: ModelConfig(num_layers=1001), "model.num_layers"),
        (lambda: ModelConfig(embed_dim=10**9), "model.embed_dim"),
        (lambda: MoEConfig(num_experts=2**31), "model.moe.num_experts"),
        (lambda: TrainConfig(steps=2**31), "train.steps"),
        (lambda: DataConfig(bpe_vocab_size=10**12), "data.bpe_vocab_size"),
    ],
)
def test_absurd_values_are_refused_at_once(make, name):
    with pytest.raises(UserError, match=rf"^{name} = .*: must be "):
        make()


@pytest.mark.parametrize("name", ["b1", "b2", "warmup_fraction"])
def test_what_must_be_below_one_is_so_in_float32(name):
    # Adam divides by 1 - b1: with 1 - 1e-12 one step made parameters infinite.
    near = 1 - 1e-12
    refused(lambda: TrainConfig(**{name: near}), f"train.{name}", near, "in [0, 1), also as float32")
    assert getattr(TrainConfig(**{name: 1 - 2**-24}), name) == 1 - 2**-24


def test_an_array_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^train\.steps = array\(.*: must be a whole number$") as error:
        TrainConfig(steps=np.ones((3, 3)))
    assert "\n" not in str(error.value)


def test_numbers_and_paths_become_what_json_knows(tmp_path):
    memory = families.ultramem(num_keys=np.int64(32), top_m=np.uint8(4), core_loss_weight=np.float32(0.5))
    config = RunConfig(
        ModelConfig(
            memories={"memory": memory}, dropout=0, rope_theta=np.int32(500), norm_eps=Fraction(1, 1024)
        ),
        DataConfig(np.str_("text"), tmp_path / "text.txt", cache_dir=tmp_path),
        TrainConfig(steps=np.int16(3), learning_rate=1),
    )
    plain = json.loads(json.dumps(to_dict(config)))
    assert run_config_from_dict(plain) == config
    assert plain["data"]["path"] == str(tmp_path / "text.txt") and plain["data"]["cache_dir"] == str(tmp_path)
    for part, name, value in (
        (config.train, "steps", 3),
        (config.train, "learning_rate", 1),
        (memory.address, "num_keys", 32),
        (memory.address, "core_loss_weight", 0.5),
        (config.model, "dropout", 0),
        (config.model, "rope_theta", 500.0),
        (config.model, "norm_eps", 2.0**-10),
        (config.data, "dataset", "text"),
    ):
        found = getattr(part, name)
        assert found == value and type(found) is type(value)
    assert type(Sampling(top_k=np.int64(3)).top_k) is int


def test_an_enumeration_of_strings_is_its_value():
    class Kind(str, enum.Enum):  # noqa: UP042
        GELU = "gelu"

    config = ModelConfig(mlp=Kind.GELU)
    assert config.mlp == "gelu" and type(config.mlp) is str


def test_a_config_is_frozen_and_can_be_replaced_as_before():
    train = TrainConfig(steps=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        train.steps = 6
    assert dataclasses.replace(train, steps=np.int64(6)) == TrainConfig(steps=6)
    assert hash(RunConfig()) == hash(RunConfig())
    refused(lambda: dataclasses.replace(train, steps=6.0), "train.steps", 6.0, "a whole number")


def test_a_membership_is_checked_as_flags_are_named():
    refused(lambda: Membership("h:1", 2.0, 0), "--num_processes", 2.0, "a whole number")
    assert Membership("h:1", np.int64(2), 0).num_processes == 2


@pytest.mark.parametrize(
    "tree, message",
    [
        (None, "config = None: must be a dict of the fields of RunConfig"),
        ([], "config = []: must be a dict of the fields of RunConfig"),
        ({"data": {}, "train": {}}, "config: must have the part 'model'"),
        ({"model": {}, "train": {}}, "config: must have the part 'data'"),
        ({"model": {}, "data": {}}, "config: must have the part 'train'"),
        ({"model": {}, "data": {}, "train": 3}, "train = 3: must be a dict of the fields of TrainConfig"),
        (
            {"model": {"memories": "x"}, "data": {}, "train": {}},
            "model.memories = 'x': must be a dict of",
        ),
        ({"model": {}, "data": None, "train": {}}, "data = None: must be of the type DataConfig"),
        ({"model": {}, "data": {}, "train": {}, 3: 1}, "unknown config key 3"),
    ],
)
def test_a_tree_that_is_no_config_is_refused(tree, message):
    with pytest.raises(UserError) as error:
        run_config_from_dict(tree)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_fields_and_the_mesh_may_be_missing_in_a_tree():
    assert run_config_from_dict({"model": {}, "data": {}, "train": {"steps": 7}}) == RunConfig(
        train=TrainConfig(steps=7)
    )
