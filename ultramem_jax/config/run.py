"""Configures a whole run, and checks that its parts fit each other."""

from dataclasses import dataclass, field

from ultramem_jax.config.data import DataConfig
from ultramem_jax.config.field_types import Checked
from ultramem_jax.config.memory import MemoryConfig
from ultramem_jax.config.mesh import MeshConfig
from ultramem_jax.config.model import ModelConfig
from ultramem_jax.config.train import TrainConfig
from ultramem_jax.errors import require


@dataclass(frozen=True)
class RunConfig(Checked):
    """Configures one run of the command `train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of the model."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Mesh of devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_mesh()
        slots = self.train.slots_per_step
        require(
            slots == 0 or bool(self.model.memories),
            "train.slots_per_step",
            slots,
            "must be 0 without a memory",
        )
        for group, memory in self.model.memories.items():
            for name, plain in (("dtype", "float32"), ("memory_kind", "device")):
                value = getattr(memory.table, name)
                require(
                    value == plain or self.train.table_gradient == "row_sparse",
                    "train.table_gradient",
                    self.train.table_gradient,
                    f"must be 'row_sparse' while model.memories.{group}.table.{name} is {value!r}",
                )

    def _check_mesh(self) -> None:
        """Checks that every mesh axis divides the sizes that are split over it."""
        mesh, model = self.mesh, self.model
        divisible = [
            ("fsdp", "model.embed_dim", model.embed_dim),
            ("tensor", "model.num_kv_heads", model.num_kv_heads),
            ("tensor", "model.num_heads", model.num_heads),
        ]
        if model.moe is None:
            divisible.append(("tensor", "model.mlp_dim", model.mlp_dim))
        else:
            divisible.append(("tensor", "model.moe.expert_dim", model.moe.expert_dim))
            divisible.append(("memory", "model.moe.num_experts", model.moe.num_experts))
        if not model.memories:
            require(mesh.width == 1, "mesh.width", mesh.width, "must be 1 without a memory")
            require(
                mesh.memory == 1 or model.moe is not None,
                "mesh.memory",
                mesh.memory,
                "must be 1 without a memory and without experts: there is nothing to split over it",
            )
        partitions = {site.config.table.partition for site in model.sites}
        require(
            len(partitions) <= 1,
            "model.memories",
            sorted(partitions),
            "must have one partition: all tables of a model are split alike",
        )
        for group, memory in model.memories.items():
            divisible += self._check_table(group, memory)
        for axis, name, size in divisible:
            require(
                size % getattr(mesh, axis) == 0,
                f"mesh.{axis}",
                getattr(mesh, axis),
                f"must divide {name} = {size}",
            )

    def _check_table(self, group: str, memory: MemoryConfig) -> list[tuple[str, str, int]]:
        """Checks a memory against mesh and batch.

        Returns:
            (mesh axis, name, size) of each size that the axis must divide.
        """
        mesh, table, path = self.mesh, memory.table, f"model.memories.{group}"
        divisible = []
        sites = [site for site in self.model.sites if site.group == group]
        slots = {site.num_slots for site in sites}
        require(
            mesh.width == 1 or table.partition == "both",
            "mesh.width",
            mesh.width,
            f"must be 1 while {path}.table.partition is {table.partition!r}",
        )
        if table.partition != "width":
            name = "num_slots of a table" + memory.address.slots_hint
            divisible += [("memory", name, size) for size in sorted(slots)]
        width_axis = {"slots": None, "width": "memory", "both": "width"}[table.partition]
        if width_axis:
            divisible.append((width_axis, f"{path}.table.value_dim", table.value_dim))
            divisible.append((width_axis, f"{path}.table.pre_value_dim", table.pre_value_dim))
            parts, weights = getattr(mesh, width_axis), memory.address.weights_per_read
            require(
                parts % weights == 0 or weights % parts == 0,
                f"mesh.{width_axis}",
                parts,
                f"must divide the {weights} weights of a read of {path} or be a multiple of them: each "
                "weighs its own slice of a value",
            )
        alone = all(getattr(mesh, axis) <= 1 for axis in ("data", "fsdp", "tensor", "memory", "width"))
        require(
            not table.prefetch
            or (
                memory.address.reads_tokens
                and table.pre_value_dim == 0
                and alone
                and self.train.grad_accumulation == 1
            ),
            f"{path}.table.prefetch",
            table.prefetch,
            "must be False unless tokens address the table (hashed_ngrams), pre_value_dim is 0, the mesh has "
            "one device and train.grad_accumulation is 1",
        )
        require(
            not table.prefetch or self.train.table_gradient == "row_sparse",
            f"{path}.table.prefetch",
            table.prefetch,
            "must be False while train.table_gradient is 'dense'",
        )
        reads = self.train.batch_size * self.data.seq_len * memory.reads_per_token
        reads *= len(sites) if table.is_shared else 1
        require(
            max(slots, default=0) + reads < 2**31,
            "train.batch_size",
            self.train.batch_size,
            f"makes {reads:,} reads of a table in a step; with its {max(slots, default=0):,} slots they must "
            "be fewer than 2**31: int32",
        )
        require(
            table.memory_kind == "device" or mesh.memory == mesh.width == 1,
            f"{path}.table.memory_kind",
            table.memory_kind,
            "must be 'device' while tables are split over devices, mesh.memory or mesh.width above 1",
        )
        return divisible
