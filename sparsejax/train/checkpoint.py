"""Checkpoints of a run: saved beside the training loop, proved whole before they are used, restored strictly.

    choice = choose("auto", folder)                       # which one, and why; print choice.considered
    state = restore(choice.path, abstract_state)          # on this run's mesh
    checkpoints = Checkpoints(folder, resumed_from=choice.step, keep=2)
    checkpoints.save(step, state, record)                 # returns once the state is copied; files follow in the background
    checkpoints.close()

One checkpoint is a folder: `state/` (Orbax), `tree.json` (every leaf's path, shape, dtype), `record.json` (what the run needs
beside arrays) and `manifest.json`, written last, without which the folder does not count. See `checkpoint_files`.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from sparsejax.parallel.launch import barrier, broadcast_flag, is_main
from sparsejax.plugs import nearest
from sparsejax.train import checkpoint_files as files
from sparsejax.train import checkpoint_tree as trees
from sparsejax.train.checkpoint_files import CheckpointError

STATE, TREE, RECORD = "state", "tree.json", "record.json"
_CHOICE_BYTES = 16 * 1024


@functools.cache  # a look-up costs some 10 ms, and each save waits for six
def versions() -> dict[str, str]:
    """Versions of what determines the bits of a run."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")}


@dataclasses.dataclass(frozen=True)
class Record:
    """What is saved beside the arrays, as JSON.

    Fields:
      step: optimizer steps done; the next batch to read is that of this step.
      config: the run's config as nested JSON values; a run that goes on from here under another prints what differs.
      data: the same for the data (source hash, tokenizer, batch size, seed).
      extra: anything else the loop wants back (loss average, seconds trained).
      versions: filled in by default.
    """

    step: int
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=versions)


class Choice(NamedTuple):
    """Where a run starts: `step` and `path` are None for a start from nothing; `considered` says what was looked at and why."""

    step: int | None
    path: Path | None
    considered: list[str]


def fingerprint(value: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal for equal JSON values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_record(path: Path | str) -> Record:
    """The record of a checkpoint folder.

    Raises:
      CheckpointError: it is missing, unreadable, or of a newer format.
    """
    path = Path(path) / RECORD
    value = files.read_json(path)
    if not isinstance(value, dict) or value.get("format") != trees.FORMAT:
        raise CheckpointError(f"{path}: format {value.get('format') if isinstance(value, dict) else value!r}; "
                              f"this version reads format {trees.FORMAT}")
    try:
        return Record(**{field.name: value[field.name] for field in dataclasses.fields(Record)})
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]!r} is missing") from error


def check_same_run(record: Record, config: Mapping[str, Any], data: Mapping[str, Any], folder: Path | str) -> None:
    """Refuse to go on in a run folder that belongs to another run.

    Raises:
      CheckpointError: naming the folder and every key of the config or data that differs, with both values.
    """
    found = [
        f"{part}.{key}: the folder has {have!r}, this run has {want!r}"
        for part, saved, wanted in (("config", record.config, config), ("data", record.data, data))
        for key, have, want in differing(_jsonable(saved), _jsonable(wanted))
    ]
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise CheckpointError(f"{folder} belongs to another run: {'; '.join(found[:8])}{more}. Use another folder, or the "
                              "config it was made with")


def _jsonable(value: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(value, default=str))


def differing(saved: Any, wanted: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, saved value, wanted value) of everything that differs between two nested dicts."""
    if not (isinstance(saved, dict) and isinstance(wanted, dict)):
        return [(prefix.rstrip("."), saved, wanted)] if saved != wanted else []
    keys = [*saved, *(key for key in wanted if key not in saved)]
    return [found for key in keys for found in differing(saved.get(key), wanted.get(key), f"{prefix}{key}.")]


def choose(resume: str, folder: Path | str) -> Choice:
    """Which checkpoint a run starts from. On several hosts one looks and all do the same.

    Args:
      resume: `auto` (the newest good one in `folder`, or nothing if there is none), `never`, `step=N` (that one in `folder`),
        or a path to a checkpoint, to a folder of checkpoints or to a run folder (the newest good one there).
      folder: this run's folder of checkpoints.
    Raises:
      CheckpointError: what was asked for by step or path is missing or damaged; with `auto`, there are checkpoints but all
        are damaged.
    """
    if jax.process_count() == 1:
        return _choose(resume, Path(folder))
    answer: dict[str, Any] = {}
    if is_main():
        try:
            choice = _choose(resume, Path(folder))
            answer = {"step": choice.step, "path": choice.path and str(choice.path), "considered": choice.considered[:32]}
        except CheckpointError as error:
            answer = {"error": str(error)[: _CHOICE_BYTES // 8]}
    answer = _from_main(answer)
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return Choice(answer["step"], answer["path"] and Path(answer["path"]), answer["considered"])


def _from_main(value: dict[str, Any]) -> dict[str, Any]:
    """Process 0's JSON value, on every process."""
    encoded = json.dumps(value).encode().ljust(_CHOICE_BYTES)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(encoded, np.uint8))))


def _choose(resume: str, folder: Path) -> Choice:
    if resume == "never":
        ignored = [f"{folder / str(step)}: ignored, as --resume never asks" for step in reversed(files.steps(folder))]
        return Choice(None, None, [*ignored, "starting from step 0"])
    if resume == "auto":
        completed = [f"{folder / str(step)}: complete but for its last rename, made now" for step in files.adopt(folder)]
        nothing = Choice(None, None, [*_unfinished(folder), f"no checkpoint in {folder}: starting from step 0"])
        choice = newest(folder) or nothing
        return choice._replace(considered=completed + choice.considered)
    if resume.startswith("step="):
        return _at_step(resume.removeprefix("step="), folder)
    return _at_path(resume)


def newest(folder: Path) -> Choice | None:
    """The newest good checkpoint of a folder, which is left as it is; None when no save was ever finished."""
    considered = _unfinished(folder)
    found = files.steps(folder)
    for step in reversed(found):
        path = folder / str(step)
        problem = files.damage(path)
        considered.append(f"{path}: {'chosen' if problem is None else f'damaged: {problem}'}")
        if problem is None:
            return Choice(step, path, considered)
    if not found:
        return None
    raise CheckpointError(f"every checkpoint in {folder} is damaged: " + "; ".join(considered)
                          + ". Start over with --resume never, which keeps them")


def _unfinished(folder: Path) -> list[str]:
    return [f"{left}: ignored, it was never finished" for left in files.leftovers(folder)]


def _at_step(text: str, folder: Path) -> Choice:
    if not text.isdigit():
        raise CheckpointError(f"--resume step={text}: N must be a number")
    path = folder / text
    there = ", ".join(map(str, files.steps(folder))) or "none"
    problem = files.damage(path)
    if problem:
        raise CheckpointError(f"--resume step={text}: {path}: {problem}. Steps in {folder}: {there}")
    return Choice(int(text), path, [f"{path}: chosen, as asked"])


def _at_path(resume: str) -> Choice:
    path = Path(resume)
    if not path.is_dir():
        hint = nearest(resume, ("auto", "never"))
        raise CheckpointError(f"--resume {resume}: neither auto, never, step=N nor a folder.{hint}")
    for holder in (path / "checkpoints", path):
        if files.steps(holder):
            choice = newest(holder)
            assert choice is not None
            return choice
    problem = files.damage(path)
    if problem:
        raise CheckpointError(f"--resume {resume}: neither a checkpoint ({problem}) nor a folder that holds any")
    return Choice(read_record(path).step, path, [f"{path}: chosen, as asked"])


def restore(path: Path | str, like: Any, *, part: str = "") -> Any:
    """The state of a checkpoint, bit for bit, in the structure and with the shardings of `like`.

    The bytes are not verified here: `choose` has done so.

    Args:
      path: a checkpoint folder.
      like: tree of ShapeDtypeStructs (their sharding is where the array goes, on any mesh; None: the first device), arrays (the
        same, their values are not read), numpy arrays and Python numbers.
      part: dotted path of the subtree to read, which `like` then describes (`"trainable"`); default the whole state.
    Raises:
      CheckpointError: listing every missing, additional, or differently shaped or typed leaf.
    """
    path = Path(path)
    prefix = part + "." if part else ""
    saved, saved_static = trees.from_json(files.read_json(path / TREE), str(path / TREE))
    flat = trees.flatten(like, prefix)
    problems = trees.differences(
        {name: leaf for name, leaf in saved.items() if name.startswith(prefix)},
        {name: trees.describe(name, leaf) for name, leaf in flat.items()},
        {name: text for name, text in saved_static.items() if name.startswith(prefix)},
        trees.static_parts(like, prefix),
    )
    if problems:
        raise CheckpointError(f"{path} does not fit this run. " + ". ".join(problems))
    stored = {name: leaf for name, leaf in flat.items() if _is_stored(saved[name])}
    arrays = _read_arrays(path / STATE, stored, partial=len(stored) < sum(map(_is_stored, saved.values()))) if stored else {}
    values = [arrays[name] if name in stored else _without_storage(saved[name], leaf) for name, leaf in flat.items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _is_stored(leaf: trees.Leaf) -> bool:
    """Whether a leaf's values are in `state/`: numbers are in the description, and empty arrays have none."""
    return leaf.kind == "array" and 0 not in leaf.shape


def _read_arrays(path: Path, wanted: dict[str, Any], partial: bool) -> dict[str, Any]:
    arguments = {name: _restore_arguments(leaf) for name, leaf in wanted.items()}
    with ocp.Checkpointer(_handler()) as checkpointer:
        read = checkpointer.restore(
            path.absolute(),
            args=ocp.args.PyTreeRestore(item=dict.fromkeys(wanted, 0), restore_args=arguments, partial_restore=partial),
        )
    return {name: _cast(read[name], leaf) for name, leaf in wanted.items()}


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray | np.generic):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    name = str(np.dtype(leaf.dtype))
    return ocp.ArrayRestoreArgs(sharding=_sharding(leaf), global_shape=tuple(leaf.shape), strict=True,
                                dtype=jnp.dtype(trees.STORED_AS.get(name, name)))


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding


def _cast(value: Any, leaf: Any) -> Any:
    """From the stored dtype to the leaf's own, where the storage layer lacks that."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(value).astype(leaf.dtype, copy=False)
    return value if value.dtype == leaf.dtype else jax.jit(lambda x: x.astype(leaf.dtype), out_shardings=_sharding(leaf))(value)


def _without_storage(saved: trees.Leaf, leaf: Any) -> Any:
    if saved.kind != "array":
        return saved.value
    if isinstance(leaf, np.ndarray | np.generic):
        return np.zeros(leaf.shape, leaf.dtype)
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=_sharding(leaf))()


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Uncompressed: zstd saves 7 % of fp32 weights and takes twice the time, on cores that the training step wants.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)


class Checkpoints:
    """Writes the checkpoints of one run into one folder; one save at a time, each in the background.

    A save that fails (a full disk) never stops training and never touches an older checkpoint: it is reported at once, the next
    save tries again, and `wait` raises if the newest one did not succeed.

    Args:
      folder: of all checkpoints, made if need be.
      resumed_from: the step this run was restored from, None for a fresh start. Checkpoints of later steps belong to a history
        that this run leaves; at its first save they are renamed to `STEP.superseded`.
      keep: how many of the newest checkpoints stay; older ones go when a newer one is complete.
      report: gets one line for a failed save and for folders that were cleaned up or set aside.
    """

    def __init__(
        self, folder: Path | str, *, resumed_from: int | None, keep: int = 2, report: Callable[[str], None] = print
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep = {keep}: at least one checkpoint must stay")
        self.folder = Path(folder).absolute()
        self.last_good: int | None = resumed_from
        self._branch: int | None = -1 if resumed_from is None else resumed_from
        self._keep = keep
        self._report = report
        logging.getLogger("absl").addFilter(_is_not_told_elsewhere)
        self._writer = ocp.AsyncCheckpointer(_handler())
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def begin(self) -> None:
        """Set the checkpoints of histories that this run leaves aside now; else its first save does."""
        if is_main() and self._branch is not None:
            self._leave_other_histories(self._branch)
            self._branch = None

    def save(self, step: int, state: Any, record: Record) -> None:
        """Start saving; returns when the state has been copied, so that its buffers may be donated.

        Waits for the save before it. A step that is the last good one already is not written again.

        Raises:
          TypeError: a leaf that cannot be saved, named by its path, or a record that is not JSON.
        """
        flat = trees.flatten(state)
        description = {name: trees.describe(name, leaf) for name, leaf in flat.items()}
        documents = {
            TREE: json.dumps(trees.to_json(description, trees.static_parts(state)), indent=0),
            RECORD: json.dumps({"format": trees.FORMAT, **dataclasses.asdict(record), "step": step}, indent=1),
        }
        self.join()
        is_there = step == self.last_good and (self.folder / str(step)).is_dir()
        if not broadcast_flag(not is_there):
            return
        arrays = _snapshot({name: leaf for name, leaf in flat.items() if _is_stored(description[name])})
        saving = self.folder / f"{step}{files.SAVING}"
        problem = self._prepare(saving, sum(array.nbytes for array in arrays.values())) if is_main() else None
        # All hosts skip a save that one of them cannot begin: the others would wait for it inside Orbax.
        if broadcast_flag(problem is not None):
            self._fail(step, saving, problem or OSError("the main process could not begin to write"))
            return
        try:
            self._writer.save(saving / STATE, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:  # whatever the storage layer raises: it is kept, reported, and raised by wait()
            self._fail(step, saving, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step, saving, documents), name=f"checkpoint-{step}")
        self._thread.start()

    def save_now(self, step: int, state: Any, record: Record) -> None:
        """Save and wait until the checkpoint is complete.

        Raises:
          CheckpointError: it could not be written.
        """
        self.save(step, state, record)
        self.wait()

    def wait(self) -> None:
        """Until nothing is being written, on all hosts.

        Raises:
          CheckpointError: the newest save failed; once, a second call does not raise it again.
        """
        self.join()
        barrier("checkpoint")
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """`wait`, then release the writer's threads; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def rolled_back(self, step: int | None) -> None:
        """The run went back to the checkpoint of this step (None: to its start): later ones are set aside at the next save."""
        self.join()
        self.last_good, self._branch = step, -1 if step is None else step

    def join(self) -> None:
        """Until this host writes nothing; asks no other host and raises nothing, for a run that ends in an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _prepare(self, saving: Path, needed: int) -> OSError | None:
        """Make the folder to write into; returns what stands against it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._branch is not None:
                self._leave_other_histories(self._branch)
                self._branch = None
            if saving.exists():
                files.remove(saving)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                return OSError(f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} free")
            saving.mkdir()
        except OSError as error:
            return error
        return None

    def _leave_other_histories(self, branch: int) -> None:
        for name in files.sweep(self.folder):
            self._report(f"{self.folder / name}: removed, it was never finished")
        for step in files.steps(self.folder):
            if step > branch:
                self._report(f"{files.set_aside(self.folder / str(step))}: set aside, this run started from before it")

    def _finish(self, step: int, saving: Path, documents: dict[str, str]) -> None:
        """The background part: wait for the arrays, seal, rename, drop what is old."""
        try:
            self._writer.wait_until_finished()  # Orbax returns on process 0 when every process has written
            if is_main():
                for name, text in documents.items():
                    (saving / name).write_text(text, encoding="utf-8")
                files.seal(saving)
                files.publish(saving, step)
        except Exception as error:  # a thread has no caller: kept, reported, and raised by wait()
            self._fail(step, saving, error)
            return
        self.last_good, self._failure = step, None
        if is_main():
            self._drop_old()

    def _drop_old(self) -> None:
        for old in files.steps(self.folder)[: -self._keep]:
            try:
                files.remove(self.folder / str(old))
            except OSError as error:
                self._report(f"{self.folder / str(old)}: could not be removed ({error.strerror})")

    def _fail(self, step: int, saving: Path, error: Exception) -> None:
        good = "no earlier one exists" if self.last_good is None else f"that of step {self.last_good} is intact"
        failure = CheckpointError(f"the checkpoint of step {step} could not be written to {self.folder}: "
                                  f"{_cause(error)}; {good}")
        failure.__cause__ = error
        self._failure = failure
        self._report(str(failure))
        if is_main() and saving.exists():
            shutil.rmtree(saving, ignore_errors=True)  # gives its space back; what resists is swept by the next run


def _cause(error: BaseException) -> str:
    """One line; a full disk, which the storage layer wraps in its own words, by its usual name."""
    full = os.strerror(errno.ENOSPC)
    lines = str(error).strip().splitlines()
    if full in str(error) and not str(error).startswith(full):
        return full
    return lines[0] if lines else type(error).__name__


def _is_not_told_elsewhere(record: logging.LogRecord) -> bool:
    """Keeps Orbax from printing a traceback per thread for an error that it also raises, and that is reported as one line."""
    return not (record.levelno >= logging.ERROR and f"{os.sep}orbax{os.sep}" in record.pathname)


def _snapshot(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays in dtypes that the storage layer has; those on a lone CPU device as copies.

    There Orbax writes from the array's own memory, and the next step, which donates it, would wait until the files are
    written (measured: 265 ms instead of 27 ms for 134 MB). Elsewhere the transfer to the host is the copy.
    """
    stored = {name: trees.STORED_AS.get(str(np.dtype(array.dtype))) for name, array in arrays.items()}
    cast = {name: array.astype(stored[name]) for name, array in arrays.items() if stored[name]}
    lone = {name: array for name, array in arrays.items() if not stored[name] and _is_on_a_lone_cpu(array)}
    copies = jax.device_put(lone, {name: array.sharding for name, array in lone.items()}, may_alias=False)
    return {**arrays, **cast, **copies}


def _is_on_a_lone_cpu(array: Any) -> bool:
    return isinstance(array, jax.Array) and len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"
