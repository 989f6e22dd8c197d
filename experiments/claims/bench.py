"""What claims compute with: compressions and training runs that are done once, kept in a folder, and shared."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments import entry
from sparsejax import config_text
from sparsejax.compress.calibration import CalibrationSpec
from sparsejax.compress.recipe import Pass
from sparsejax.compress.session import Request, compress
from sparsejax.data.sources import data_directories
from sparsejax.evaluate.perplexity import Difference, paired_difference
from sparsejax.evaluate.progress import no_progress
from sparsejax.evaluate.scope import Scope
from sparsejax.plugs import check
from sparsejax.train.final import HELD_OUT

SMOLLM2 = "smollm2-135m"
# Of models trained here, whose positions end at 128: windows that are evaluated, and that passes are fitted to.
RUN_WINDOW, RUN_WINDOWS, RUN_CALIBRATION = 128, 128, 512


@dataclass
class Bench:
    """Where claims run.

    Fields:
      folder: keeps what was computed; another run goes on from it.
      tier: of compressions, see `compress.recipe.TIERS`.
    """

    folder: Path
    tier: str = "quick"
    _dense: dict[tuple[str, str], Path] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """What compressions are evaluated on: the text that every user has, and the others that are there."""
        present = any((folder / "c4_sample.txt").exists() for folder in data_directories(""))
        return ("stdlib:evaluation", *(("c4_sample:evaluation",) if present else ()))

    @property
    def calibration(self) -> CalibrationSpec:
        """On the other splits of all of these texts, as much as the tier has: no method is judged out of its domain alone."""
        return CalibrationSpec(",".join(text.replace(":evaluation", ":calibration") for text in self.texts), 0, 0)

    def compressed(self, recipe: str, *, model: str | Run = SMOLLM2, scope: str = "all", seed: int = 0) -> Rows:
        """A model after a recipe of `configs/recipes`, e.g. `"teal:0.5"`, beside the dense model on the same tokens.

        A run is calibrated on the text that it was trained on and evaluated on its held-out part, in windows of its length.

        Args:
          seed: of the calibration's choice of text.
        """
        run = model if isinstance(model, Run) else None
        model = str(model.folder) if isinstance(model, Run) else model
        name, colon, argument = recipe.partition(":")
        path = f"configs/recipes/{name}.py{colon}{argument}"
        passes = entry.from_file("recipe", path, "get_recipe")
        check(all(isinstance(one, Pass) for one in passes), "recipe", path, "get_recipe must return a list of passes")
        seeded = f"seed{seed}" if seed else ""
        out = self.folder / "compressed" / _slug(run.folder.name if run else model, scope, recipe, seeded)
        calibration = CalibrationSpec(sequences=RUN_CALIBRATION, length=RUN_WINDOW) if run else self.calibration
        request = Request(
            model=model,
            out=out,
            recipe=path,
            recipe_text=Path(f"configs/recipes/{name}.py").read_text(encoding="utf-8"),
            passes=tuple(passes),
            data=("stdlib:evaluation",) if run else self.texts,
            tier=self.tier,
            calibration=dataclasses.replace(calibration, seed=seed),
            scope=Scope(scope),
            window=RUN_WINDOW if run else 0,
            limit=RUN_WINDOWS if run else 0,
            baseline=str(self._dense.get((model, scope), "")),
            pieces=self.folder / "pieces",
            decode_tokens=0,
        )
        request = dataclasses.replace(request, about=entry.about(_command(request)))
        with _quietly(out.with_name(f"{out.name}.log")) if run else contextlib.nullcontext():
            dense, row = compress(request)["rows"]
        self._dense.setdefault((model, scope), out)
        return Rows(dense, row)

    def trained(self, config: str, *, seed: int = 0, **overrides: Any) -> Run:
        """A training run of `configs/NAME.py[:ARGUMENT]`; what it prints goes to `log.txt` in its folder.

        The folder is named after a hash of the resolved config, the run that it starts from included, so that claims share
        runs, and a changed config is trained anew.

        Args:
          overrides: fields of the config, `model__d_model=64`; `init` may be a run.
        """
        from sparsejax.io.load import load
        from sparsejax.train.run import train

        file, colon, argument = config.partition(":")
        flags = [f"--config=configs/{file}.py{colon}{argument}", f"--config.seed={seed}"]
        flags += [f"--config.{key.replace('__', '.')}={_flag(value)}" for key, value in overrides.items()]
        call, _ = entry.parse(["claims", *flags])
        assert call.config is not None
        named = dataclasses.replace(call.config, init=_name(overrides.get("init", "")))  # wherever the bench's folder lies
        digest = hashlib.sha256(config_text.to_text(named).encode()).hexdigest()
        out = self.folder / "runs" / _slug(config, f"seed{seed}", digest[:12])
        result = out / "claim_result.json"
        if not result.exists():
            began = time.perf_counter()
            with _quietly(out / "log.txt"):
                found = train(call.config, base=call.base, out=out, command=" ".join(flags), loader=load)
            if not found["finished"]:
                raise KeyboardInterrupt  # the run has met a signal and saved itself; the same command goes on from there
            entry.write_json(result, found)
            print(f"  trained {out.name} in {time.perf_counter() - began:.0f} s", flush=True)
        return Run(out, json.loads(result.read_text(encoding="utf-8")))

    def ppl_p(self, run: Run, *, percent: float = 1.0, step: int | None = None) -> Truncated:
        """PPL-p% of a run by CETT (see `compress.ppl_p`), at its end or at the checkpoint of a step."""
        from sparsejax.compress.analysis import Plan, analyze
        from sparsejax.evaluate.texts import open_text
        from sparsejax.train.load_run import load_run

        plan = Plan(window=RUN_WINDOW, limit=RUN_WINDOWS, percents=(percent,), calibration_windows=RUN_WINDOWS // 4)
        text = open_text("stdlib", "evaluation", ())
        model, kept = load_run(run.folder, step=step), self.folder / "analysis"
        (found,) = analyze(model, [text], plan, (), folder=kept, progress=no_progress)
        one = found.searches["cett"].results[0]
        zeros = float(np.mean(found.activity.sites["mlp.down"].zero_fraction))
        return Truncated(one.sparsity, one.low, one.high, zeros)


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Fields:
      folder: of the run.
      result: as `experiments.train --json` writes it.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def found(self) -> dict[str, Any]:
        """What was measured at its end."""
        return dict(self.result["results"])

    @property
    def loss(self) -> float:
        """On held-out data, nats."""
        return float(self.found["loss"])

    @property
    def zeros(self) -> float:
        """Share of exact zeros in the FFN's hidden vector, on held-out data."""
        return float(self.found["zero_fraction"])

    @cached_property
    def losses(self) -> np.ndarray:
        """Of each held-out sequence, nats per target."""
        with np.load(self.folder / HELD_OUT) as sums:
            used = sums["weight"] > 0
            return np.asarray(sums["nll"][used] / sums["weight"][used])

    def above(self, other: Run) -> Difference:
        """Loss of this run less the other's, on the same held-out sequences, with its standard error."""
        return paired_difference(self.losses, other.losses)


@dataclass(frozen=True)
class Truncated:
    """PPL-p%: sparsity with its interval of one standard error; and the exact zeros of the model as it is."""

    sparsity: float
    low: float
    high: float
    zeros: float

    def __str__(self) -> str:
        """In per cent, with its interval."""
        return f"{100 * self.sparsity:.1f} % zeros ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclasses.dataclass(frozen=True)
class Rows:
    """The dense row and a method's row of one report."""

    dense: dict[str, Any]
    row: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Model sparsity, as realised."""
        return float(self.row["sparsity"]["model"])

    @property
    def bytes(self) -> float:
        """Bytes per decoded token over dense."""
        return float(self.row["bytes"]["relative"])

    def losses(self, text: str) -> np.ndarray:
        """Of each window of a text, in nats."""
        return np.asarray(_result(self.row, text)["values"])

    def dense_losses(self, text: str) -> np.ndarray:
        return np.asarray(_result(self.dense, text)["values"])

    def rise(self, text: str) -> Difference:
        """Loss over dense in nats, on the same windows, with its standard error."""
        return paired_difference(self.losses(text), self.dense_losses(text))

    @property
    def notes(self) -> dict[str, Any]:
        """What the recipe's passes said of themselves, by pass."""
        return {name.partition("-")[2]: note for name, note in self.row["notes"].items()}

    def perplexity(self, text: str) -> float:
        return float(_result(self.row, text)["perplexity"])

    def dense_perplexity(self, text: str) -> float:
        return float(_result(self.dense, text)["perplexity"])

    def ratio(self, text: str) -> float:
        """Perplexity over dense."""
        return self.perplexity(text) / self.dense_perplexity(text)


def gap(ours: Rows, theirs: Rows, text: str) -> Difference:
    """Loss of ours minus theirs in nats, on the same windows, with its standard error."""
    return paired_difference(ours.losses(text), theirs.losses(text))


def _command(request: Request) -> str:
    """What computes one of the bench's compressions alone."""
    given = {"model": request.model, "recipe": request.recipe, "calibration": request.calibration.source, "tier": request.tier,
             "scope": request.scope.tokens, "calibration-sequences": request.calibration.sequences, "window": request.window,
             "calibration-length": request.calibration.length, "seed": request.calibration.seed,
             "limit": request.limit}
    flags = [f"--{name}={value}" for name, value in given.items() if value]
    flags += [f"--data={text}" for text in request.data]
    return shlex.join(["python", "-m", "experiments.compress", *flags, "--decode-tokens=0", f"--out={request.out}"])


@contextlib.contextmanager
def _quietly(path: Path) -> Iterator[None]:
    """What is printed goes to a file: many short runs would hide the claims."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _flag(value: Any) -> str:
    return str(value.folder) if isinstance(value, Run) else str(value)


def _name(start: Any) -> str:
    return start.folder.name if isinstance(start, Run) else str(start)


def _result(row: dict[str, Any], text: str) -> dict[str, Any]:
    return next(result for result in row["results"] if result["data"] == text)


def _slug(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join(part for part in parts if part)).strip("_")
