"""A run from its config to its results: set up, resume, step, log, evaluate, save, report.

The loop dispatches step t and then handles the metrics of step t - 1, so that the device never waits for the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.config import ExperimentConfig
from sparsejax.data.pipeline import BatchIterator, DataPipeline
from sparsejax.evaluate import likelihood
from sparsejax.models.sizes import flops_per_token
from sparsejax.parallel import launch, rules
from sparsejax.plugs import ConfigError
from sparsejax.train import metrics, optim
from sparsejax.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    Choice,
    Record,
    check_same_run,
    choose,
    differing,
    read_record,
    restore,
)
from sparsejax.train.frozen import FROZEN, frozen_digest, restore_frozen, save_frozen
from sparsejax.train.partition import joined
from sparsejax.train.progress import ProgressReport, StepTimer
from sparsejax.train.setup import Setup, examples_to_tokens
from sparsejax.train.state import TrainState

MAX_ROLLBACKS = 10


class TrainingStopped(ConfigError):
    """The loss became unusable and the config says to stop; what was saved before is intact."""


@dataclasses.dataclass
class Position:
    """Where a run stands beside its TrainState: the next batch's index, batches left out, and the printed loss average."""

    data_index: int = 0
    skipped: list[int] = dataclasses.field(default_factory=list)
    loss_ema: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluation_row(found: likelihood.Likelihood) -> dict[str, float]:
    """What was measured on held-out data, as a row of the metrics."""
    return {f"eval/{name}": value for name, value in found._asdict().items() if math.isfinite(value)}


class Termination:
    """SIGTERM and SIGINT as a flag: the loop saves and leaves after the step in hand."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread (a notebook's worker): no handler there
                self._previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trainer:
    """The loop's parts in one place: `restore` gives it a state and its checkpoints, `run` goes from there to the last step."""

    state: TrainState
    checkpoints: Checkpoints
    origin: Choice  # where the run started; a roll back before its first save goes there
    frozen_digest: str  # of the frozen parameters in this run's folder; "" until they are there

    def __init__(self, setup: Setup, data: DataPipeline, folder: Path):
        self.setup, self.data, self.folder = setup, data, folder
        self.config: ExperimentConfig = setup.config
        self.position = Position()
        self.last_evaluation: dict[str, float] = {}
        self.rollbacks = 0
        tokens = examples_to_tokens(self.config)
        device = setup.mesh.devices.flat[0]
        self.flops_per_token = flops_per_token(self.config.model, tokens)
        self.peak = metrics.peak_flops(device.device_kind, self.config.model.dtype, self.config.log.peak_flops)
        self.tokens_per_step = self.config.batch_size * tokens

    def run(self) -> bool:
        """Train to the last step; returns whether it got there (False: a signal asked to stop, and the state is saved)."""
        config, first = self.config, self.step
        self.zero_fraction = math.nan
        self.timer = StepTimer(config.steps, first)
        try:
            with (
                ProgressReport(config.steps, config.log.every, first, enabled=launch.is_main()) as self.report,
                Termination() as termination,
            ):
                while (finished := self._run_from_here(termination)) is None:
                    self._roll_back()
            with self.timer.pause():
                self.checkpoints.close()
        finally:
            # An interpreter that is shutting down starts no threads: a save that is still under way then would be lost.
            self.checkpoints.join()
        return finished

    def _run_from_here(self, termination: Termination) -> bool | None:
        """Steps from the present state on; `run`'s answer, or None after an unusable step when the config says to roll back."""
        config, main = self.config, launch.is_main()
        step = self.step
        self.ema = metrics.DebiasedEMA(**self.position.loss_ema)
        stream = metrics.MetricStream()
        self.watch_log = metrics.WatchLog(self.folder, step + 1) if main else None
        names, config_json = config.log.writers if main else (), json.dumps(dataclasses.asdict(config))
        with (
            metrics.Writers(self.folder, names, config_json, step + 1) as self.writers,
            contextlib.closing(self._batches()) as batches,
        ):
            while step < config.steps:
                batch = next(batches)
                watch = self._watches(step + 1)
                compiled = self.setup.train(self.setup.stage(step), watch)
                self.state, found = compiled(self.state, batch)
                step += 1
                found["data_index"] = np.int32(self.position.data_index)
                self.position.data_index += 1
                usable = self._handle(stream.push(step, found))
                self.timer.tick(step, self.tokens_per_step)
                if usable and self._due(config.evaluate.every, step):
                    usable = self._handle(stream.flush())
                    if usable:
                        self._evaluate(step)
                if usable and (self._due(config.checkpoint.every, step) or step == config.steps):
                    usable = self._handle(stream.flush()) and self._save(step)
                if usable and self._stops(termination, step):
                    usable = self._handle(stream.flush()) and self._save(step)
                    if usable:
                        self.checkpoints.wait()
                        self.report.print(f"stopped on request after step {step:,}; --resume auto goes on from there")
                        return False
                if not usable:
                    return None
        return True

    @property
    def step(self) -> int:
        """Optimizer steps done; waits for the device."""
        return int(jax.device_get(self.state.step))

    def _batches(self) -> Generator[dict[str, jax.Array]]:
        """Batches on their devices from `position.data_index` on, without those that were found unusable."""
        rows = launch.process_rows(self.config.batch_size, self.setup.mesh)
        start = self.position.data_index
        with contextlib.closing(BatchIterator(self.data, rows, start)) as batches:
            for index, batch in enumerate(batches, start):
                if index not in self.position.skipped:
                    self.position.data_index = index
                    yield launch.global_batch(batch, self.setup.mesh, self.config.batch_size)

    def _watches(self, step: int) -> bool:
        return self._due(self.config.log.watch_every, step) or (
            self.config.log.watch_every > 0 and step == self.config.steps
        )

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _stops(self, termination: Termination, step: int) -> bool:
        # Agreeing over hosts waits for the devices, so it is done on logging steps only.
        if jax.process_count() == 1:
            return termination.requested
        return self._due(self.config.log.every, step) and launch.broadcast_flag(termination.requested)

    def _handle(self, record: metrics.Record | None) -> bool:
        """Log a fetched step; False when it was unusable and the config says to roll back."""
        if record is None:
            return True
        values = dict(record.scalars)
        data_index = int(values.pop("data_index"))
        bad = bool(values["bad"])
        self.ema = self.ema if bad else self.ema.update(values["loss"])
        self.position.loss_ema = dataclasses.asdict(self.ema)
        rate = self.timer.tokens_per_second
        values |= {"loss_ema": self.ema.value, "tokens_per_second": rate}
        values["mfu"] = metrics.mfu(self.flops_per_token, rate, self.setup.mesh.size, self.peak)
        arrays = {name.removeprefix("watch/"): value for name, value in record.arrays.items()}
        if "zero_fraction" in arrays:
            self.zero_fraction = float(np.mean(arrays["zero_fraction"]))
            values["zero_fraction"] = self.zero_fraction
        if self.watch_log and self._watches(record.step):
            norms = {name: values.pop(name) for name in list(values) if "_norm/" in name}
            self.watch_log.write(record.step, {**arrays, **norms})
        shown = {**values, "seconds_left": self.timer.seconds_left}
        if not math.isnan(self.zero_fraction):
            shown["zero_fraction"] = self.zero_fraction
        self.report.update(record.step, shown)
        if self._due(self.config.log.every, record.step) or record.step in (1, self.config.steps) or bad:
            self.writers.write(record.step, values)
        return self._judge(record.step, data_index, values) if bad else True

    def _judge(self, step: int, data_index: int, values: dict[str, float]) -> bool:
        """What the config says of an unusable step; its batch is written down whatever that is."""
        policy = self.config.checkpoint.on_nan
        what = f"step {step:,}: loss {values['loss']:.6g}, gradient norm {values['gradient_norm']:.6g}, batch {data_index:,}"
        if launch.is_main():
            with (self.folder / "bad_batches.jsonl").open("a") as file:
                row = {"step": step, "data_index": data_index, "loss": repr(values["loss"]), "policy": policy}
                file.write(json.dumps(row) + "\n")
        self.report.print(f"unusable {what}: {policy}")
        if policy == "skip":
            return True
        if policy == "stop":
            raise TrainingStopped(
                f"{what} is not usable; checkpoints before it are intact in {self.folder / 'checkpoints'} "
                "(checkpoint.on_nan = 'skip' or 'rollback' go on instead)"
            )
        self.position.skipped.append(data_index)
        return False

    def _roll_back(self) -> None:
        """Go back to the last checkpoint, leaving out the batches that were found unusable."""
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS:
            raise TrainingStopped(f"rolled back {MAX_ROLLBACKS} times; batches left out: {self.position.skipped}")
        skipped = self.position.skipped
        with self.timer.pause():
            with contextlib.suppress(CheckpointError):  # of a save that failed, which was reported then: go back further
                self.checkpoints.wait()
            # Before this run's first save, the newest checkpoint of the folder may be of a history that it has left.
            saved = self.checkpoints.last_good != self.origin.step
            self.restore(choose("auto", self.folder / "checkpoints") if saved else self.origin)
        self.position.skipped = sorted({*self.position.skipped, *skipped})
        self.report.print(f"rolled back to step {self.step:,}; batches left out: {self.position.skipped}")

    def choose(self, resume: str) -> Choice:
        """The checkpoint to start from (see `checkpoint.choose`); prints what was considered."""
        choice = choose(resume, self.folder / "checkpoints")
        if launch.is_main():
            print("\n".join(f"resume: {line}" for line in choice.considered))
        return choice

    def restore(self, choice: Choice) -> int:
        """Bring state and position from a checkpoint, or draw a new state; returns the step."""
        if choice.path is None:
            self.state, self.position = self.setup.init(), Position()
        else:
            record = read_record(choice.path)
            check_same_run(record, record.config, self._data_identity(), choice.path)
            if launch.is_main():
                for key, saved, wanted in differing(record.config, json.loads(json.dumps(dataclasses.asdict(self.config)))):
                    print(f"resume: config.{key} was {saved!r} when the checkpoint was made, is {wanted!r} now")
            like = self.setup.abstract_state
            state = restore(choice.path, like._replace(frozen={}))
            self.state = state._replace(frozen=restore_frozen(choice.path, like.frozen))
            self.position = Position(**record.extra["position"])
        if not hasattr(self, "checkpoints"):
            self.origin = choice
            self.checkpoints = Checkpoints(
                self.folder / "checkpoints", resumed_from=choice.step, keep=self.config.checkpoint.keep,
                report=lambda text: self.report.print(text),
            )
            own = choice.path is not None and choice.path.parent.resolve() == self.checkpoints.folder.resolve()
            self.frozen_digest = frozen_digest(self.checkpoints.folder) if own else ""
        else:
            self.checkpoints.rolled_back(choice.step)
        return choice.step or 0

    def _save(self, step: int) -> bool:
        with self.timer.pause():
            extra: dict[str, Any] = {"position": self.position.as_json()}
            if self.state.frozen:
                extra[FROZEN] = self._saved_frozen()
            record = Record(step, dataclasses.asdict(self.config), self._data_identity(), extra)
            self.checkpoints.save(step, self.state._replace(frozen={}), record)
        return True

    def _saved_frozen(self) -> str:
        """The digest of what is not trained, which is written before this history's first checkpoint and never again."""
        if not self.frozen_digest:
            self.checkpoints.begin()
            self.frozen_digest = save_frozen(self.checkpoints.folder, self.state.frozen, self.report.print)
        return self.frozen_digest

    def _data_identity(self) -> dict[str, Any]:
        return {"fingerprint": self.data.fingerprint, "seed": self.data.seed, "batch_size": self.data.batch_size}

    def evaluated_parameters(self) -> Any:
        """All parameters as they are evaluated: those that were trained as their average, where there is one."""
        trained = optim.evaluated(self.config.optimizer, self.state.optimizer, self.state.trainable)
        return joined(self.state.average or trained, self.state.frozen)

    def _evaluate(self, step: int) -> None:
        with self.timer.pause():
            found = self.evaluate(self.config.evaluate.batches)
        row = evaluation_row(found)
        self.writers.write(step, row)
        bits, accuracy = f"bits per byte {found.bits_per_byte:.4f}", f"accuracy {found.accuracy:.4f}"
        shown = bits if math.isfinite(found.bits_per_byte) else accuracy
        self.report.print(f"evaluation at step {step:,}: loss {found.loss:.4f} +- {found.loss_error:.4f}, {shown}")

    def evaluate(self, batches: int) -> likelihood.Likelihood:
        """Likelihood of the first `batches` held-out batches."""
        return likelihood.summarise(self.held_out_sums(batches))

    def held_out_sums(self, batches: int, corruption: str = "") -> dict[str, np.ndarray]:
        """Sums of each held-out sequence (see `likelihood.gather`), under a corruption of the images if one is named."""
        step = self.setup.evaluate(self.setup.stage(self.step), False)
        parameters = self.evaluated_parameters()
        token_bytes = self.token_bytes()
        held_out = self.held_out(batches, corruption)
        return likelihood.gather(lambda batch: step(parameters, token_bytes, batch), held_out, metrics.fetch)

    def token_bytes(self) -> jax.Array:
        """float32[V], UTF-8 bytes of each token on every device; zeros where the data is not text."""
        counts = np.zeros(self.config.model.vocab_size, np.float32)
        if self.data.tokenizer is not None:
            counts[: self.data.tokenizer.vocab_size] = self.data.tokenizer.token_bytes
        return jax.device_put(counts, rules.replicated(self.setup.mesh))

    def held_out(self, batches: int, corruption: str = "") -> Iterator[dict[str, jax.Array]]:
        """The first held-out batches on their devices."""
        rows = launch.process_rows(self.config.batch_size, self.setup.mesh)
        for batch in self.data.evaluation_batches(batches, rows, corruption):
            yield launch.global_batch(batch, self.setup.mesh, self.config.batch_size)
