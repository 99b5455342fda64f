"""Configures the training of a model: steps, optimizers, evaluations and checkpoints."""

import re
from dataclasses import dataclass
from typing import Literal

from ultramem_jax.config.field_types import Checked, FilePath
from ultramem_jax.config.row_states import RowArray, RowOptimizer, row_arrays
from ultramem_jax.errors import at_least, fraction, guards_a_denominator, require


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Configures the training. Defaults with a source are the UltraMem paper's (its training of table 1)."""

    PREFIX = "train."

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 16
    """Sequences per step, over all devices and accumulated micro-batches."""
    grad_accumulation: int = 1
    """Number of micro-batches in a step. Gradients and losses are their means. The loads in balance losses,
    of experts and of UltraMemV2's keys, are counted within each micro-batch."""
    learning_rate: float = 1e-3
    """Peak of the learning rate, reached after warm-up."""
    warmup_fraction: float = 0.01
    """Share of the steps in which the learning rate rises linearly from 0."""
    final_lr_fraction: float = 0.1
    """Share of the peak learning rate at which the cosine decay ends."""
    optimizer: Literal["adamw", "muon", "lion"] = "adamw"
    """Optimizer of the dense parameters: `adamw`; `muon` (Jordan et al., 2024) on the weights of matrix
    products, separately for each expert, and AdamW on the rest; or `lion` (arXiv 2302.06675)."""
    b1: float = 0.9
    """Decay of AdamW's first moment; for Lion, the weight of its momentum in a step."""
    b2: float = 0.95
    """Decay of AdamW's second moment; for Lion, the decay of its momentum."""
    eps: float = 1e-8
    """Number that keeps the denominators of AdamW and Adagrad, roots of squared gradients, from zero."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate, for every optimizer. It applies to matrices and to the
    rows of a table that were read, but not to gains and biases."""
    clip_norm: float = 1.0
    """Global norm to which the gradient of the dense parameters is clipped. 0 switches clipping off."""
    trainable: str = ""
    """Regular expression of the parameters that learn, searched in names such as `layer_3/attention/w_query`.
    Tables are named `ultramem_0/values`, or `ultramem_tables/values` if shared. Other parameters stay as they
    are, without gradient and without optimizer state. Empty matches all."""
    lora_rank: int = 0
    """Rank r of LoRA's factors (arXiv 2106.09685), 0 for none. The matrices that they adapt must not learn
    themselves: `trainable=lora/` trains only the factors."""
    lora_alpha: float = 16.0
    """α of LoRA, whose products are weighted by α/r."""
    lora_targets: str = "attention/w_(query|value)$"
    """Regular expression of the matrices of layers that LoRA adapts; those of experts cannot be."""
    remat: Literal["none", "products", "layers"] = "none"
    """Activations that the backward pass computes again to save memory. `none`: keeps all. `products`:
    all of a layer but the results of products with weights. `layers`: all of a layer, from its input.
    Memories keep what they need."""
    table_gradient: Literal["row_sparse", "dense"] = "row_sparse"
    """Form of a table's gradient: `row_sparse` touches only the rows that were read; `dense` is the plain
    reference, linear in slots, against which tests compare it."""
    row_optimizer: RowOptimizer = "adamw"
    """Optimizer of the rows of tables, see `ultramem_jax.training.row_rules`: `adamw`; `adamw_catch_up`,
    whose moments first decay by the steps that did not read the row; `adagrad`; `adagrad_row`, which keeps
    one number per row; `sgd`; `sgd_momentum`."""
    momentum: float = 0.9
    """Decay of the trace of `sgd_momentum`."""
    row_second_moment: Literal["element", "row"] = "element"
    """Second moments of Adam on a table's rows: `element` keeps one for every value, `row` one per row."""
    row_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the moments of a row's values, `float32` or `bfloat16`; also of Adagrad's sums and the trace
    of SGD. Numbers that are kept once per row are float32."""
    row_rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Rounding of bfloat16 rows and moments: `stochastic`, unbiased however small the update, or
    `nearest`."""
    slots_per_step: int = 0
    """Rows t of each table that a step may change: those with the best `slot_score` among the rows that it
    read (sparse memory fine-tuning, arXiv 2510.15103), however low the last of them scores. 0 changes all."""
    slot_score: Literal["tf_idf", "kl", "reads"] = "tf_idf"
    """Score of rows for `slots_per_step`, see `ultramem_jax.training.slot_selection`: `tf_idf` and `kl`
    compare a step's reads with those of `background`, `reads` counts them without."""
    background: FilePath = ""
    """File of background reads for `slot_score`, as the command `background` writes it."""
    seed: int = 0
    """Seed of initialisation, dropout and the order of the data."""
    log_every: int = 10
    """Steps between training records, whose losses are means over these steps. The last step is recorded."""
    eval_every: int = 250
    """Steps between evaluations. The last step always evaluates. 0 evaluates only at the last step."""
    eval_batches: int = 32
    """Batches of the validation split per evaluation, always the same ones. 0 takes all."""
    checkpoint_every: int = 250
    """Steps between checkpoints. The last step always saves. 0 saves only at the last step."""
    keep_last: int = 2
    """Number of newest checkpoints that are kept."""
    keep_best: int = 1
    """Number of checkpoints with the best validation loss that are kept. Only a checkpoint of a step that
    also evaluates can be among the best, so make `checkpoint_every` a multiple of `eval_every`."""
    tensorboard: bool = False
    """True to write TensorBoard event files as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, train__steps=self.steps, train__batch_size=self.batch_size)
        at_least(1, train__grad_accumulation=self.grad_accumulation, train__log_every=self.log_every)
        at_least(1, train__keep_last=self.keep_last)
        at_least(0, train__keep_best=self.keep_best, train__eval_every=self.eval_every)
        at_least(0, train__eval_batches=self.eval_batches, train__seed=self.seed)
        at_least(0, train__checkpoint_every=self.checkpoint_every, train__clip_norm=self.clip_norm)
        at_least(0, train__weight_decay=self.weight_decay, train__learning_rate=self.learning_rate)
        fraction(train__warmup_fraction=self.warmup_fraction, train__b1=self.b1, train__b2=self.b2)
        fraction(train__momentum=self.momentum)
        at_least(0, train__lora_rank=self.lora_rank, train__lora_alpha=self.lora_alpha)
        for name in ("trainable", "lora_targets"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                self.require(False, name, f"must be a regular expression: {error}")
        guards_a_denominator("train.eps", self.eps)
        require(self.steps < 2**31, "train.steps", self.steps, "must be below 2**31: int32")
        require(self.seed < 2**32, "train.seed", self.seed, "must be below 2**32")
        require(
            0 <= self.final_lr_fraction <= 1,
            "train.final_lr_fraction",
            self.final_lr_fraction,
            "must be in [0, 1]",
        )
        for name, plain in (("row_second_moment", "element"), ("row_moment_dtype", "float32")):
            require(
                self.table_gradient == "row_sparse" or getattr(self, name) == plain,
                f"train.{name}",
                getattr(self, name),
                f"must be {plain!r} while train.table_gradient is 'dense'",
            )
        require(
            self.table_gradient == "row_sparse" or self.row_optimizer != "adamw_catch_up",
            "train.table_gradient",
            self.table_gradient,
            "must be 'row_sparse' while train.row_optimizer is 'adamw_catch_up': it asks which rows are read",
        )
        self._check_row_options()
        self._check_selection()
        require(
            self.batch_size % self.grad_accumulation == 0,
            "train.grad_accumulation",
            self.grad_accumulation,
            f"must divide batch_size = {self.batch_size}",
        )

    def _check_row_options(self) -> None:
        """Raises `UserError` for options that the optimizer of rows does not have."""
        without = f"while train.row_optimizer is {self.row_optimizer!r}"
        options = {"second_moment": "element", "moment_dtype": "float32"}
        for name, plain in options.items():
            value = getattr(self, f"row_{name}")
            changed = row_arrays(self.row_optimizer, **{name: value}) != row_arrays(self.row_optimizer)
            require(changed or value == plain, f"train.row_{name}", value, f"must be {plain!r} {without}")
        plain_momentum = TrainConfig.momentum
        require(
            self.row_optimizer == "sgd_momentum" or self.momentum == plain_momentum,
            "train.momentum",
            self.momentum,
            f"must be {plain_momentum} {without}: only 'sgd_momentum' has one",
        )

    def _check_selection(self) -> None:
        """Raises `UserError` for a selection of rows without its parts, or parts without a selection."""
        at_least(0, train__slots_per_step=self.slots_per_step)
        selects, score = self.slots_per_step > 0, self.slot_score
        self.require(
            not selects or self.table_gradient == "row_sparse",
            "table_gradient",
            "must be 'row_sparse' while train.slots_per_step is above 0",
        )
        if not selects:
            self.require(score == "tf_idf", "slot_score", "must be 'tf_idf' while train.slots_per_step is 0")
        wanted = selects and score != "reads"
        if wanted:
            allowed = f"must name the file of background reads that the score {score!r} compares with"
            self.require(self.background != "", "background", f"{allowed} (command `background`)")
        else:
            reason = "train.slots_per_step is 0" if not selects else f"train.slot_score is {score!r}"
            self.require(self.background == "", "background", f"must be empty while {reason}")

    @property
    def row_arrays(self) -> tuple[RowArray, ...]:
        """Returns the arrays that the optimizer of rows keeps for a table."""
        return row_arrays(self.row_optimizer, self.row_second_moment, self.row_moment_dtype)
