"""What claims compute with: compressions and training runs that are done once, kept in a folder, and shared."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import entry
from sparsejax.compress.calibration import CalibrationSpec
from sparsejax.compress.recipe import Pass
from sparsejax.compress.session import Request, compress
from sparsejax.data.sources import data_directories
from sparsejax.evaluate.perplexity import Difference, paired_difference
from sparsejax.evaluate.scope import Scope
from sparsejax.plugs import check

SMOLLM2 = "smollm2-135m"


@dataclass
class Bench:
    """Where claims run.

    Fields:
      folder: keeps what was computed; another run goes on from it.
      tier: of compressions, see `compress.recipe.TIERS`.
      command: for the record.
    """

    folder: Path
    tier: str = "quick"
    command: str = ""
    _dense: dict[tuple[str, str], Path] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """What compressions are evaluated on: the text that every user has, and the others that are there."""
        present = any((folder / "c4_sample.txt").exists() for folder in data_directories(""))
        return ("stdlib:evaluation", *(("c4_sample:evaluation",) if present else ()))

    def compressed(self, recipe: str, *, model: str = SMOLLM2, scope: str = "all") -> Rows:
        """A model after a recipe of `configs/recipes`, e.g. `"teal:0.5"`, beside the dense model on the same tokens."""
        name, colon, argument = recipe.partition(":")
        path = f"configs/recipes/{name}.py{colon}{argument}"
        passes = entry.from_file("recipe", path, "get_recipe")
        check(all(isinstance(one, Pass) for one in passes), "recipe", path, "get_recipe must return a list of passes")
        out = self.folder / "compressed" / _slug(model, scope, recipe)
        request = Request(
            model=model,
            out=out,
            recipe=path,
            recipe_text=Path(f"configs/recipes/{name}.py").read_text(encoding="utf-8"),
            passes=tuple(passes),
            data=self.texts,
            tier=self.tier,
            calibration=CalibrationSpec(sequences=0, length=0),
            scope=Scope(scope),
            baseline=str(self._dense.get((model, scope), "")),
            decode_tokens=0,
            about={"command": self.command},
        )
        dense, row = compress(request)["rows"]
        self._dense.setdefault((model, scope), out)
        return Rows(dense, row)

    def trained(self, config: str, *, seed: int = 0, **overrides: Any) -> dict[str, Any]:
        """The result of a training run of `configs/NAME.py[:ARGUMENT]`, as `experiments.train --json` writes it."""
        from sparsejax.train.run import train

        file, colon, argument = config.partition(":")
        flags = [f"--config=configs/{file}.py{colon}{argument}", f"--config.seed={seed}"]
        flags += [f"--config.{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        out = self.folder / "runs" / _slug(config, f"seed{seed}", *map(str, sorted(overrides.items())))
        result = out / "claim_result.json"
        if not result.exists():
            call, _ = entry.parse(["claims", *flags])
            found = train(call.config, base=call.base, out=out, command=" ".join(flags))  # type: ignore[arg-type]
            entry.write_json(str(result), found)
        return {**json.loads(result.read_text(encoding="utf-8")), "run": str(out)}


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


def _result(row: dict[str, Any], text: str) -> dict[str, Any]:
    return next(result for result in row["results"] if result["data"] == text)


def _slug(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join(part for part in parts if part)).strip("_")
