"""Runs training: it builds or resumes a run, steps, evaluates, saves, and stops in good order."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping

import jax
import numpy as np
from tqdm import tqdm

from ultramem_jax.accounting import count_parameters
from ultramem_jax.config import ModelConfig, RunConfig, to_dict
from ultramem_jax.data import Corpus, PeekingIterator, Tokenizer, load_corpus, train_iterator
from ultramem_jax.data.tokenizers import require_vocabulary
from ultramem_jax.errors import LossNotFinite, require
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.distributed import (
    PeriodicQuestion,
    from_first,
    gather,
    is_first,
    require_same,
)
from ultramem_jax.parallel.known_faults import warn_of_known_faults
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes, rows_here, shard_batch
from ultramem_jax.parallel.table_layouts import by_rows
from ultramem_jax.training.checkpoints import Checkpoints
from ultramem_jax.training.continuing import check_same_run, corpus_identity, say_what_changed
from ultramem_jax.training.dense_optimizer import Optimizers, make_optimizers
from ultramem_jax.training.evaluation import Evaluation, Evaluator, TargetBytes, bits_per_byte
from ultramem_jax.training.in_flight import StepsInFlight
from ultramem_jax.training.initial import Initial
from ultramem_jax.training.metrics import MetricWriter
from ultramem_jax.training.prefetch import Prefetched, gather_ahead, prefetching_sites, slots_of_tokens
from ultramem_jax.training.profiling import Profile
from ultramem_jax.training.refusals import refusals_in_a_line
from ultramem_jax.training.restore import kept_tokenizer, mend_tokenizer, save_tokenizer
from ultramem_jax.training.room import require_room, running_out_in_a_line
from ultramem_jax.training.slot_selection import background_of
from ultramem_jax.training.state import (
    TrainState,
    abstract_state,
    fresh_state,
    model_variables,
)
from ultramem_jax.training.step import Metrics, StepResult, checked_metrics, is_finite, make_train_step
from ultramem_jax.training.stopping import EvaluationStopped, StopOnSigterm
from ultramem_jax.training.token_maps import for_tokenizer, with_token_maps
from ultramem_jax.training.undo_log import is_worth_it
from ultramem_jax.training.window import LossWindow
from ultramem_jax.training.workdir import owned

log = logging.getLogger(__name__)

_NONE = Evaluation(loss=math.nan, bits_per_byte=math.nan, tokens=0)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Describes how a run ended."""

    step: int
    """Number of steps done."""
    finished: bool
    """False if a signal stopped the run early. The same command then resumes it."""
    validation_loss: float
    """Loss of the last evaluation, in nats per token; NaN if there was none."""
    validation_bits_per_byte: float
    """Loss of the last evaluation, in bits per byte of text; NaN if there was none."""
    tokens_per_second: float
    """Mean speed over the last steps of this process, without evaluations and checkpoints. It is NaN after
    one step."""
    state: TrainState
    tokenizer: Tokenizer
    """The tokenizer of its corpus."""


def train(
    config: RunConfig,
    workdir: str | pathlib.Path,
    *,
    progress: bool = True,
    corpus: Corpus | None = None,
    profile: Profile | None = None,
    initial: Callable[[], Initial] | None = None,
) -> TrainResult:
    """Trains a new run, or resumes the run that `workdir` holds.

    All processes that have joined call it together.

    It writes `metrics.jsonl` and `checkpoints/` into `workdir`, which no other run may use meanwhile. The
    same config and workdir resume bit for bit: an interrupted run ends on the same numbers as an
    uninterrupted one. Each training record holds the mean `loss` and `bits_per_byte` of the steps since the
    record before it.

    SIGTERM stops the run after the steps in flight, or between two batches of an evaluation, and saves it.

    Args:
        config: the run's config.
        workdir: folder of this run, created if it is missing. Several processes share it.
        progress: whether to draw a progress bar on standard error.
        corpus: prepared data, if it is at hand already. Otherwise it is made from `config.data`.
        profile: what to profile; None for nothing.
        initial: loads the variables with which a new run begins. A run that resumes does not call it; None
            draws all.

    Raises:
        UserError: bad input; a checkpoint of another model, text or tokenizer; a workdir that is in use; a
            file that the system cannot write or read; a loss that is not finite. The checkpoints before it
            stay.
    """
    workdir = pathlib.Path(workdir)
    with refusals_in_a_line(workdir), running_out_in_a_line(count_parameters(config.model).total):
        return _train(config, workdir, progress, corpus, profile, initial)


def _train(
    config: RunConfig,
    workdir: pathlib.Path,
    progress: bool,
    corpus: Corpus | None,
    profile: Profile | None,
    initial: Callable[[], Initial] | None,
) -> TrainResult:
    if is_first():
        warn_of_known_faults()
    # Refused before a corpus is prepared for it. A run that resumes does not read the file again.
    begun = from_first((workdir / "checkpoints").exists())
    background = {} if begun else background_of(config)
    corpus = corpus if corpus is not None else load_corpus(config.data, kept_tokenizer(config.data, workdir))
    check_vocabulary(config, corpus)
    config, token_map = for_tokenizer(config, corpus.tokenizer)
    axes = mesh_axes(config, make_mesh(config.mesh))
    _require_together(config, corpus, background, workdir)
    for site in prefetching_sites(config.model):
        require(
            axes.mesh.size == 1,
            f"model.memories.{site.group}.table.prefetch",
            True,
            f"must be False on {axes.mesh.size} devices: rows are gathered ahead on one",
        )
    size = config.train.batch_size
    data = PeekingIterator(train_iterator(corpus, size, config.train.seed, rows_here(axes, size)))
    corpus.require_sequences("validation")  # fails now, not after hours of training
    optimizers = make_optimizers(config)
    abstract = abstract_state(config, optimizers, axes)
    require_room(abstract, count_parameters(config.model).total)
    evaluate = Evaluator(config, corpus, axes)
    train = config.train
    with (
        owned(workdir) as require_owned,
        Checkpoints(workdir / "checkpoints", train.keep_last, train.keep_best) as checkpoints,
        StopOnSigterm() as stop,
    ):
        window = LossWindow()
        if checkpoints.latest_step() is None:
            if is_first():
                save_tokenizer(corpus.tokenizer, workdir)
            # The seed is an argument, so that a compilation cache needs only one program for all seeds.
            seed = np.uint32(config.train.seed)
            given = initial() if initial is not None else Initial({})
            given = given._replace(background=background or background_of(config))
            state, start = fresh_state(config, optimizers, axes, seed, abstract, given), 0
            del given
            if token_map is not None:
                state = state.replace(buffers=with_token_maps(config.model, state.buffers, token_map))
        else:
            check_same_run(checkpoints.read_meta(), config, corpus, workdir)
            restored = checkpoints.restore(abstract, data, expect_config=to_dict(config))
            state, start = restored.state, restored.step
            window = LossWindow.of(restored.meta.since_record)
            if is_first():
                mend_tokenizer(corpus.tokenizer, workdir)
            if start == train.steps:
                log.info("already finished: step %d of %s", start, workdir)
            else:
                say_what_changed(restored.meta, config, workdir)
                log.info("resumed from step %d of %s", start, workdir)
        log.info("corpus %s (%s) in %s", corpus.corpus_hash[:12], config.data.dataset, corpus.folder)
        # A run that stopped between a save and its evaluation evaluates that checkpoint now.
        unmarked = start > 0 and _due(start, train.eval_every, start == train.steps)
        unmarked = unmarked and not checkpoints.is_marked(start)
        step_function = _StepFunction(config, optimizers, axes, state, checkpoints)
        with (
            MetricWriter(workdir, train.tensorboard, start or None, without_validation=unmarked)
            if is_first()
            else contextlib.nullcontext()
        ) as writer:
            target_bytes = TargetBytes(corpus.tokenizer, axes)
            run = _Run(
                config=config,
                checkpoints=checkpoints,
                require_owned=require_owned,
                writer=writer,
                evaluator=evaluate,
                target_bytes=target_bytes,
                data=data,
                corpus=corpus,
                stop=stop,
                asked=PeriodicQuestion(),
                profile=profile or Profile(),
                window=window,
            )
            shard = functools.partial(shard_batch, axes=axes, batch_size=size)
            return run.steps(state, start, unmarked, step_function, shard, progress and is_first())


def check_vocabulary(config: RunConfig, corpus: Corpus) -> None:
    """Refuses a tokenizer that produces ids which the model does not have.

    Raises:
        UserError: the tokenizer has more ids than `model.vocab_size`.
    """
    require_vocabulary(corpus.tokenizer, config.model.vocab_size, "the tokenizer")


def _require_together(
    config: RunConfig, corpus: Corpus, background: Mapping[str, np.ndarray], workdir: pathlib.Path
) -> None:
    """Refuses processes that have different settings or data, or that do not share one folder."""
    if jax.process_count() == 1:
        return
    parts = {f"the config's {name}": part for name, part in to_dict(config).items() if name != "data"}
    parts |= {"corpus": corpus.corpus_hash, "tokenizer": corpus.tokenizer.fingerprint}
    read = hashlib.sha256(b"".join(background[table].tobytes() for table in sorted(background)))
    require_same(parts | {"background of selected rows": read.hexdigest()})
    token = workdir / f".{from_first(uuid.uuid4().hex)}"
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        token.touch()
    from_first(None)  # waits until the file exists
    seen = gather(token.exists())
    if is_first():
        token.unlink()
    require(all(seen), "--workdir", str(workdir), "must be one folder that all processes share")


class _StepFunction:
    """Holds the compiled step.

    Where a save may read tables meanwhile, the step also tells it what it overwrites.

    Such a step is used whether a save is in flight or not. Another program would round in other places, and
    then a run's numbers would depend on how long its saves take.
    """

    def __init__(
        self,
        config: RunConfig,
        optimizers: Optimizers,
        axes: MeshAxes,
        state: TrainState,
        checkpoints: Checkpoints,
    ):
        """Prepares the step for arrays that are placed as those of `state` are."""
        row_sparse = config.train.table_gradient == "row_sparse"
        self.records = row_sparse and is_worth_it(state.tables, state.table_state)
        self._checkpoints = checkpoints
        shardings = jax.tree.map(lambda a: a.sharding, state)
        if row_sparse:
            tables = state.tables, state.table_state
            tables, moments = jax.tree.map(lambda a: by_rows(a.shape, a.sharding), tables)
            shardings = shardings.replace(tables=tables, table_state=moments)
        sites = prefetching_sites(config.model)
        beside = (state.step.sharding,) * (1 + self.records + bool(sites))
        train_step = make_train_step(config, optimizers, self.records, axes)

        def step(
            state: TrainState, tokens: jax.Array, halted: jax.Array, *ahead: tuple[Prefetched, jax.Array]
        ) -> tuple[jax.Array, StepResult]:
            after = train_step(state, tokens, halted, *ahead)
            return halted | ~is_finite(after[1]), after

        shardings = state.step.sharding, (shardings, *beside)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        self._rows: Prefetched = {}
        """Rows of the coming batch; empty before the first step."""
        self._gather = jax.jit(functools.partial(_rows_of, config.model)) if sites else None
        # The device notices a loss that is not finite before the host does, and writes no more rows.
        self._halted = jax.device_put(np.zeros((), bool), state.step.sharding)

    @property
    def prefetches(self) -> bool:
        """Tells whether a step wants the next batch, too."""
        return self._gather is not None

    def __call__(
        self, state: TrainState, tokens: jax.Array, following: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        """Dispatches a step.

        Args:
            state: the state; donated.
            tokens: the batch.
            following: the next batch, if the step `prefetches`.
        """
        with self._checkpoints.recorded_step() if self.records else contextlib.nullcontext() as undo_log:
            state, metrics, *before = self._given(state, tokens, following)
            if undo_log is not None:
                undo_log.record(state.tables, state.table_state, before[0])
            return state, metrics

    def _given(self, state: TrainState, tokens: jax.Array, following: jax.Array | None) -> StepResult:
        if self._gather is None:
            self._halted, after = self._step(state, tokens, self._halted)
            return tuple(after)
        rows = self._rows or self._gather(state, tokens)
        self._halted, after = self._step(state, tokens, self._halted, (rows, following))
        *after, self._rows = after
        return tuple(after)


def _rows_of(model: ModelConfig, state: TrainState, tokens: jax.Array) -> Prefetched:
    return gather_ahead(model, state.tables, slots_of_tokens(model, state.buffers, tokens))


@dataclasses.dataclass
class _Run:
    """Holds what all steps of a run share."""

    config: RunConfig
    checkpoints: Checkpoints
    require_owned: Callable[[], None]
    """Refuses to save into a folder that belongs to another run by now."""
    writer: MetricWriter | None
    """Metric writer of the first process; None in the others."""
    evaluator: Evaluator
    target_bytes: TargetBytes
    data: PeekingIterator
    corpus: Corpus
    stop: StopOnSigterm
    asked: PeriodicQuestion
    """Asks whether any process was asked to stop."""
    profile: Profile
    window: LossWindow
    validation: Evaluation = _NONE
    """The newest evaluation."""

    def steps(
        self,
        state: TrainState,
        start: int,
        unmarked: bool,
        step_function: "_StepFunction",
        shard: Callable[[np.ndarray], jax.Array],
        progress: bool,
    ) -> TrainResult:
        """Runs the steps from `start` + 1 to the last one of the config.

        If `unmarked`, it evaluates `start` first.
        """
        train = self.config.train
        in_flight, step, stopping = StepsInFlight(), start, False
        coming: jax.Array | None = None
        bar = tqdm(total=train.steps, initial=start, unit="step", disable=not progress, dynamic_ncols=True)
        self.profile.expect(train.steps - start)
        with bar, self.profile:
            if unmarked or start == train.steps:  # a finished run still reports its numbers
                bar.set_postfix_str("evaluating")
                stopping = not self._evaluate(step, state, known=not unmarked)
                in_flight.restart_clock()
            # Compiling makes the first step take up to a minute.
            bar.set_postfix_str("compiling" if step < train.steps else "")
            while step < train.steps and not stopping:
                with self.profile.of_step(step + 1):
                    tokens = next(self.data)["tokens"]
                    batch = shard(tokens) if coming is None else coming
                    if step_function.prefetches:
                        # After the last step nothing comes, and its own tokens will do.
                        coming = shard(self.data.peek()["tokens"]) if step + 1 < train.steps else batch
                    num_bytes = self.target_bytes(batch)
                    state, metrics = step_function(state, batch, coming)
                step += 1
                in_flight.add(step, metrics, num_bytes)
                last = step == train.steps
                saved, evaluated = (
                    _due(step, every, last) for every in (train.checkpoint_every, train.eval_every)
                )
                self._account_for(in_flight, bar, wait_for_all=last or saved or evaluated)
                # The signal may reach only one process, or reach them in different steps.
                stopping = self.asked(self.stop.requested, step, in_flight.seconds_per_step()) and not last
                if stopping:
                    self._account_for(in_flight, bar, wait_for_all=True)
                if stopping or saved:
                    self._save(step, state, step_function.records)
                if evaluated and not stopping:
                    said = bar.postfix or ""
                    bar.set_postfix_str("evaluating")
                    stopping = not self._evaluate(step, state)
                    bar.set_postfix_str(said)
                    if stopping and not saved:
                        self._save(step, state, step_function.records)
                if saved or evaluated:
                    in_flight.restart_clock()
        self.checkpoints.wait()
        if stopping:
            log.info("stopped by SIGTERM; step %d is saved, the same command goes on from there", step)
        speed = self._targets / in_flight.seconds_without_first()
        found = self.validation
        return TrainResult(
            step, not stopping, found.loss, found.bits_per_byte, speed, state, self.corpus.tokenizer
        )

    @property
    def _targets(self) -> int:
        """Returns the targets of a batch."""
        return self.config.train.batch_size * self.config.data.seq_len

    def _account_for(self, in_flight: StepsInFlight, bar: tqdm, wait_for_all: bool) -> None:
        """Checks the results of finished steps, shows them and writes the records that are due.

        Raises:
            UserError: a number is not finite. No later step has been saved.
        """
        train = self.config.train
        finished = in_flight.finished(self.asked.seconds_per_step, wait_for_all)
        for step, metrics, num_bytes in finished:
            self._require_finite({name: metrics[name] for name in checked_metrics(metrics)}, step)
            loss, target_bytes = metrics["loss"], num_bytes / self._targets
            self.window.add(loss, target_bytes)
            speed = self._targets / in_flight.seconds_per_step()
            bits = bits_per_byte(loss, target_bytes)
            bar.set_postfix_str(f"loss {loss:.3f} ({bits:.3f} bits/byte), {speed:,.0f} tokens/s")
            bar.update()
            if step == train.steps or step % train.log_every == 0:
                self._write(step, "train", metrics | self.window.take() | {"tokens_per_second": speed})

    def _evaluate(self, step: int, state: TrainState, known: bool = False) -> bool:
        """Evaluates after `step`. Unless the result is known, writes it down and ranks the step's checkpoint.

        Returns:
            False if SIGTERM interrupted it.
        """
        asked, batches, began = PeriodicQuestion(), itertools.count(), time.perf_counter()

        def stop_if_wanted() -> None:
            done = next(batches)
            seconds_per_batch = (time.perf_counter() - began) / done if done else math.nan
            if asked(self.stop.requested, done, seconds_per_batch):
                raise EvaluationStopped

        try:
            self.validation = self.evaluator(model_variables(state), before_batch=stop_if_wanted)
        except EvaluationStopped:
            return False
        found = self.validation
        if not known:
            self._write(step, "validation", {"loss": found.loss, "bits_per_byte": found.bits_per_byte})
        # A checkpoint with such a loss is not ranked. So a resumed run evaluates it again, and stops again.
        self._require_finite({"validation loss": found.loss}, step)
        if not known:
            self.checkpoints.mark(step, found.loss)
        return True

    def _write(self, step: int, split: str, scalars: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(step, split, scalars)

    def _save(self, step: int, state: TrainState, recorded: bool) -> None:
        self.require_owned()
        self.checkpoints.save(
            step,
            state,
            self.data,
            config=to_dict(self.config),
            corpus=corpus_identity(self.corpus),
            since_record=dataclasses.asdict(self.window),
            recorded=recorded,
        )

    def _require_finite(self, values: dict[str, float], step: int) -> None:
        bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
        if not bad:
            return
        self.checkpoints.wait()
        steps = self.checkpoints.all_steps()
        good = max((kept for kept in steps if kept < step), default=None)
        last = "there is no checkpoint yet"
        if good is not None:
            last = f"the last good checkpoint is that of step {good}"
        if step in steps:
            last += f", and that of step {step}, which is kept, cannot be gone on from"
        raise LossNotFinite(
            f"step {step}: {bad}: must be finite; {last}; lower train.learning_rate or raise "
            "train.warmup_fraction"
        )


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
