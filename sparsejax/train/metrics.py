"""From a metric on the device to files: one delayed fetch, a debiased average, MFU, and the writers of a run folder.

    record = stream.push(step, device_metrics)     # step is already dispatched; what comes back is step - 1
    if record: writers.write(record.step, record.scalars)

Files in the run folder: `metrics.csv`, `metrics.jsonl` (one object per row, `step` first; not-a-number is null there and
spelled out in the CSV), `tensorboard/`, and `stats/STEP.npz` with the per-layer arrays of one watching step (see WatchLog).
A row of the CSV and JSONL files is handed to the operating system before `write` returns: a killed process loses none.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from sparsejax.plugs import ConfigError, check, check_choice


def fetch(tree: Any) -> Any:
    """Device arrays to numpy. The only place in training that waits for a device: a test replaces it by a spy."""
    return jax.device_get(tree)


class Record(NamedTuple):
    """The metrics of one step on the host: numbers by `part/name`, and arrays (per layer, per position) likewise."""

    step: int
    scalars: dict[str, float]
    arrays: dict[str, np.ndarray]


class MetricStream:
    """Holds back one step's metrics, so that step t is always dispatched before those of t - 1 are fetched.

    A checkpoint that promises the rows before it is saved after `flush`.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, Any] | None = None

    def push(self, step: int, device_metrics: Mapping[str, Any]) -> Record | None:
        """Take over the metrics of a dispatched step; the record of the step pushed before it, None at the first.

        Args:
          step: the step's number.
          device_metrics: nested dict of arrays on the device; their copy to the host starts now and is not waited for.
        """
        for leaf in jax.tree.leaves(device_metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        previous, self._pending = self._pending, (step, device_metrics)
        return _fetched(previous)

    def flush(self) -> Record | None:
        """The last record, waiting for its step; None when it was already given out."""
        previous, self._pending = self._pending, None
        return _fetched(previous)


def _fetched(pending: tuple[int, Any] | None) -> Record | None:
    if pending is None:
        return None
    flat = dict(_flatten(fetch(pending[1])))
    scalars = {name: float(value) for name, value in flat.items() if value.ndim == 0}
    return Record(pending[0], scalars, {name: value for name, value in flat.items() if value.ndim})


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)


@dataclasses.dataclass(frozen=True)
class DebiasedEMA:
    """Exponential moving average without the pull of its start: after t values, total_t / (1 - beta^t).

    total_t = beta total_{t-1} + (1 - beta) x_t with total_0 = 0 (Adam's correction, Kingma and Ba 2015, section 3).
    Immutable, and three numbers: a checkpoint stores `dataclasses.asdict(ema)` and `DebiasedEMA(**fields)` goes on exactly.
    """

    beta: float = 0.95
    total: float = 0.0
    count: int = 0

    def update(self, x: float) -> DebiasedEMA:
        """The average with one more value; one that is not finite (a skipped step's loss) is left out."""
        if not math.isfinite(x):
            return self
        return DebiasedEMA(self.beta, self.beta * self.total + (1 - self.beta) * x, self.count + 1)

    @property
    def value(self) -> float:
        """The average; nan before the first value."""
        return self.total / (1 - self.beta**self.count) if self.count else math.nan


# Dense peak flop/s per JAX device: (bfloat16, float32 arrays at JAX's default matmul precision). That precision is TF32 on
# these GPUs and one bfloat16 pass on TPUs. Vendors' data sheets without structured sparsity; boards of one name that
# differ in clock or power have their own row, and a board without a row has no peak.
_NVIDIA_PEAKS = {
    "NVIDIA A100": (312e12, 156e12),
    "NVIDIA H100 80GB HBM3": (989e12, 494.5e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H100 NVL": (835e12, 417.5e12),
    "NVIDIA H200": (989e12, 494.5e12),
    "NVIDIA H200 NVL": (835e12, 417.5e12),
    "NVIDIA B200": (2250e12, 1125e12),
}
_TPU_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # 2307e12 per chip, which JAX sees as two devices.
    "TPU7x": 1153.5e12,
}


def peak_flops(device_kind: str, dtype: str = "bfloat16", override: float = 0.0) -> float:
    """Dense matmul peak of one device in flop/s; nan where it is not known.

    Args:
      device_kind: `jax.devices()[0].device_kind`.
      dtype: compute dtype, float32 or bfloat16 (others: nan).
      override: `log.peak_flops` of the config; used when positive.
    """
    check(override >= 0, "log.peak_flops", override, "must be positive, or 0 for the table of known devices")
    if override:
        return float(override)
    if dtype not in ("bfloat16", "float32"):
        return math.nan
    if device_kind in _TPU_PEAKS:
        return _TPU_PEAKS[device_kind]
    # A MIG slice carries the name of the whole board.
    found = [name for name in _NVIDIA_PEAKS if name in device_kind and "MIG" not in device_kind]
    return _NVIDIA_PEAKS[max(found, key=len)][dtype == "float32"] if found else math.nan


def mfu(flops_per_token: float, tokens_per_second: float, devices: int, peak: float) -> float:
    """Model flops utilisation, a fraction: flops_per_token * tokens_per_second / (devices * peak); nan without a peak.

    Source: PaLM (Chowdhery et al., 2022, arXiv 2204.02311), appendix B; recomputation under remat does not count.
    """
    return flops_per_token * tokens_per_second / (devices * peak)


def mfu_formula(flops_per_token: float, devices: int, device_kind: str, peak: float) -> str:
    """The formula with this run's numbers in it, as printed before the first step."""
    if math.isnan(peak):
        return f"MFU: nan, the peak of {device_kind!r} is not known (log.peak_flops gives it)"
    per_device = f"{peak / 1e12:g} Tflop/s" if peak >= 1e12 else f"{peak / 1e9:g} Gflop/s"
    return f"MFU = {flops_per_token:.4g} flops/token x tokens/s / ({devices} x {per_device} peak of {device_kind})"


class Writer(Protocol):
    """One destination of metric rows."""

    def write(self, step: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The row as Python floats; a device array is refused, for `float()` of it would wait for the device here."""
    waiting = [name for name, value in row.items() if isinstance(value, jax.Array)]
    if waiting:
        raise TypeError(f"metrics {waiting} are still on the device; they come through MetricStream")
    return {name: float(value) for name, value in row.items()}


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def replace_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def _whole_lines(path: Path) -> list[str]:
    """The file's lines; a last one without its end (the process was killed while writing it) is left out."""
    if not path.exists():
        return []
    try:
        lines = path.read_text().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file ({error}); move it away to start anew") from error
    return lines[:-1]


class JsonlWriter:
    """`metrics.jsonl`: a strict JSON object per row."""

    def __init__(self, folder: Path, config_json: str, first_step: int) -> None:
        del config_json
        path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if _json_row(path, line)["step"] < first_step]
        replace_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _json_row(path: Path, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} holds a line that is not JSON ({error}): {line[:80]!r}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ConfigError(f"{path} holds a line that is no metric row with a step: {line[:80]!r}")
    return row


class CsvWriter:
    """`metrics.csv`: one column per metric ever seen; a new one rewrites the file under the wider header."""

    def __init__(self, folder: Path, config_json: str, first_step: int) -> None:
        del config_json
        self._path = folder / "metrics.csv"
        table = list(csv.reader(_whole_lines(self._path))) or [["step"]]
        self._columns, rows = table[0], table[1:]
        if self._columns[:1] != ["step"] or not all(row[:1] and row[0].isdigit() for row in rows):
            raise ConfigError(f"{self._path} is not a metrics file: its first column must be `step` with whole numbers")
        self._rewrite([row for row in rows if int(row[0]) < first_step])

    def _rewrite(self, rows: Iterable[Sequence[str]]) -> None:
        padded = [list(row) + [""] * (len(self._columns) - len(row)) for row in rows]
        replace_text(self._path, "".join(f"{_csv_line(row)}\n" for row in [self._columns, *padded]))
        self._file = self._path.open("a")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            self._file.close()
            self._columns = self._columns + new
            self._rewrite(list(csv.reader(_whole_lines(self._path)))[1:])
        # Nine digits bring every float32 back exactly.
        cells = [str(step)] + [f"{row[name]:.9g}" if name in row else "" for name in self._columns[1:]]
        self._file.write(_csv_line(cells) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _csv_line(cells: Sequence[str]) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\r') else cell for cell in cells)


class TensorBoardWriter:
    """`tensorboard/`: event files; the events of a run that went further than it is resumed from are purged."""

    def __init__(self, folder: Path, config_json: str, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        events = folder / "tensorboard"
        for stale in events.glob("events.out.tfevents.*") if not first_step else ():
            stale.unlink()
        # Files are named by the second they were opened in: without the suffix a quick restart overwrites its predecessor.
        options = {"purge_step": first_step or None, "filename_suffix": f".step{first_step}", "flush_secs": 30}
        self._writer = SummaryWriter(str(events), **options)
        self._writer.add_text("config", f"```json\n{config_json}\n```", first_step)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if math.isfinite(value):  # TensorBoard draws no nan, and its writer warns of each
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Weights & Biases; the run id is kept in the folder, so that a resumed run continues its page."""

    def __init__(self, folder: Path, config_json: str, first_step: int) -> None:
        import wandb

        kept = folder / "wandb_id.txt"
        run_id = kept.read_text().strip() if first_step and kept.exists() else None
        self._run = wandb.init(dir=str(folder), name=folder.name, id=run_id, resume="allow", config=json.loads(config_json))
        kept.write_text(self._run.id)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


_WRITERS: dict[str, Any] = {"csv": CsvWriter, "jsonl": JsonlWriter, "tensorboard": TensorBoardWriter, "wandb": WandbWriter}
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_writers(names: Sequence[str]) -> None:
    """Raise a ConfigError for an unknown or repeated writer, or one whose package is not installed."""
    for name in names:
        check_choice("log.writers", name, _WRITERS)
        check(list(names).count(name) == 1, "log.writers", tuple(names), f"{name!r} is given twice")
        package = _PACKAGES.get(name)
        installed = package is None or importlib.util.find_spec(package) is not None
        check(installed, "log.writers", name, f"needs the package {package!r} (pip install {package}), or leave it out")


class Writers:
    """All the metric files of a run, opened for a run that starts or goes on at `first_step`."""

    def __init__(self, folder: str | os.PathLike[str], names: Sequence[str], config_json: str, first_step: int = 0) -> None:
        """Open the writers; rows of `first_step` and later, left by a run that was killed, are dropped.

        Args:
          folder: the run folder, created when missing.
          names: of csv, jsonl, tensorboard, wandb; empty on hosts other than the first.
          config_json: the resolved config, kept beside the curves where the destination has a place for it.
          first_step: the first step that will be written; 0 starts anew.
        Raises:
          ConfigError: an unknown writer, a package that is not installed, or a file in the folder that holds no metrics.
        """
        check_writers(names)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._writers: list[Writer] = [_WRITERS[name](folder, config_json, first_step) for name in names]

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Write one row everywhere. Names are free, `part/name` groups them; one step may have several rows."""
        numbers = _numbers(row)
        for writer in self._writers:
            writer.write(int(step), numbers)

    def close(self) -> None:
        """Finish every writer."""
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl` in order, null as nan; empty when there is none. Raises a ConfigError on a damaged line."""
    path = Path(folder) / "metrics.jsonl"
    rows = [_json_row(path, line) for line in _whole_lines(path)]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


class WatchLog:
    """The arrays of watching steps, one `stats/STEP.npz` each.

    Names that the run page draws, each optionally behind a prefix such as `encoder/`:
      zero_fraction [L], zero_fraction_position [L, T], dead_units [L] (counts) or dead_fraction [L],
      attention_entropy [L] (nats), and the scalars param_norm/PART, grad_norm/PART, update_norm/PART.
    Any other array is kept as well. Beside `NAME_position`, `NAME_position_length` holds the T that it covers.
    """

    def __init__(self, folder: str | os.PathLike[str], first_step: int = 0, max_positions: int = 256) -> None:
        """Open the log; files of `first_step` and later, left by a run that was killed, are removed.

        Args:
          folder: the run folder.
          first_step: the first step that will be written; 0 starts anew.
          max_positions: a longer last axis of a `*_position` array is averaged into this many bins, to bound the files.
        """
        self._folder, self._max_positions = Path(folder) / "stats", max_positions
        self._folder.mkdir(parents=True, exist_ok=True)
        for step, path in _watch_files(folder):
            if step >= first_step:
                path.unlink()

    def write(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Write one watching step's arrays and scalars as float32, whole or not at all."""
        stored = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
        lengths: dict[str, Any] = {}
        for name, value in stored.items():
            if name.endswith("_position"):
                stored[name] = _binned(value, self._max_positions)
                lengths[f"{name}_length"] = np.float32(value.shape[-1])
        path = self._folder / f"{step:09d}.npz"
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            np.savez(file, **stored, **lengths)  # type: ignore[arg-type]
        os.replace(temporary, path)


def _binned(values: np.ndarray, bins: int) -> np.ndarray:
    """The last axis averaged into at most `bins` stretches of nearly equal length."""
    if values.shape[-1] <= bins:
        return values
    edges = np.linspace(0, values.shape[-1], bins + 1).astype(int)
    return np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges).astype(values.dtype)


def _watch_files(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    return sorted((int(path.stem), path) for path in (Path(folder) / "stats").glob("*.npz") if path.stem.isdigit())


def read_watch(folder: str | os.PathLike[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every watched quantity: name -> (steps int[N], values float32[N, ...]), of the steps that measured it.

    Raises a ConfigError for a damaged file, and for a quantity whose shape changes along the run.
    """
    series: dict[str, tuple[list[int], list[np.ndarray]]] = {}
    for step, path in _watch_files(folder):
        try:
            with np.load(path) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
            raise ConfigError(f"{path} is damaged ({error}); remove it to draw the others") from error
        for name, value in arrays.items():
            steps, values = series.setdefault(name, ([], []))
            if values and values[0].shape != value.shape:
                raise ConfigError(f"{path}: {name!r} has shape {value.shape}, but {values[0].shape} at step {steps[0]}")
            steps.append(step)
            values.append(value)
    return {name: (np.asarray(steps), np.stack(values)) for name, (steps, values) in series.items()}
