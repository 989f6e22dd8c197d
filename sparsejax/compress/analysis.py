"""What `experiments.analyze` does: a model's activations counted on texts, and how sparse its FFN may be made at p per cent."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.compress.calibration import Calibration, CalibrationSpec, calibrate, check_disjoint
from sparsejax.compress.ppl_p import Search, check_searchable, ppl_p
from sparsejax.compress.recipe import TIERS, Work
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.evaluate.perplexity import Windows, cut_windows
from sparsejax.evaluate.progress import Advance, progress_bar
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.sparsity import BLOCKS, UNION, Activity, ActivityCounter
from sparsejax.evaluate.texts import EvaluationText
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError, check

Progress = Callable[[str, int], AbstractContextManager[Advance]]
MEASURING: Progress = functools.partial(progress_bar, unit="", doing="measuring")  # what is counted stands in the titles


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Fields:
      window, limit: tokens per window; windows of each text, 0: all.
      union, blocks: sizes of batches and of blocks, see `evaluate.sparsity`.
      scope: at which tokens.
      percents: p of PPL-p%; none: it is not searched.
      truncations: what is searched, see `compress.ppl_p`.
      calibration: text to fit truncations to; "": the calibration split of each text, stdlib's where it has none.
      calibration_windows: of it; a layer's trade between error and sparsity is a mean over all their tokens.
      allow_overlap: whether calibration may overlap the text.
    """

    window: int = 512
    limit: int = 8
    union: tuple[int, ...] = UNION
    blocks: tuple[int, ...] = BLOCKS
    scope: Scope = field(default_factory=Scope)
    percents: tuple[float, ...] = ()
    truncations: tuple[str, ...] = ("cett",)
    calibration: str = ""
    calibration_windows: int = 2
    allow_overlap: bool = False


@dataclass(frozen=True)
class Analysis:
    """Of one text.

    Fields:
      data, sha256: the text. window, windows, windows_total: as cut. scope: as text.
      activity: counted under the model as it is.
      searches: PPL-p% by truncation. not_run: why there is none, or "".
      calibration: what truncations were fitted to.
    """

    data: str
    sha256: str
    window: int
    windows: int
    windows_total: int
    scope: str
    keep_first: int
    activity: Activity
    searches: dict[str, Search]
    not_run: str
    calibration: dict[str, Any]


def analyze(
    model: Model,
    texts: Sequence[EvaluationText],
    plan: Plan,
    directories: Sequence[Path],
    *,
    folder: Path | None = None,
    progress: Progress = MEASURING,
) -> list[Analysis]:
    """Measure a model on texts.

    Args:
      model: a decoder with its tokenizer.
      texts: held out.
      directories: data folders, for the calibration texts.
      folder: where finished work is kept, under a hash of the model, the tokens and the protocol; None: nowhere.
      progress: (what is done, its pieces) -> context manager of a function that takes the pieces just finished.
    Raises:
      ConfigError: what the parts refuse; all of it before the first forward pass. A model without a dense FFN in every layer is
        counted, and `not_run` says why nothing was searched.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"--model = {model.name!r}: has no tokenizer, so that no text can be put to it")
    check(model.config.kind == "decoder", "--model", model.name, f"is of kind {model.config.kind!r}; expected a decoder")
    check(2 <= plan.window <= model.config.max_length, "--window", plan.window,
          f"must be 2 to {model.config.max_length}, the positions of {model.name}")  # fmt: skip
    counter = ActivityCounter(plan.window, scope=plan.scope, union=plan.union, blocks=plan.blocks)
    not_run = _unsearchable(model, plan)
    cut = [cut_windows(text.text, tokenizer, plan.window, plan.limit, text.name) for text in texts]
    calibrations = [
        _calibration(text, windows, plan, tokenizer, directories) if plan.percents and not not_run else None
        for text, windows in zip(texts, cut, strict=True)
    ]
    identity = _sha256(model) if folder else ""
    found = []
    for text, windows, calibration in zip(texts, cut, calibrations, strict=True):
        kept = folder / "kept" / _key(identity, plan, windows, calibration) if folder else None
        work = Work(calibration or _nothing(windows), TIERS["quick"], kept, progress)
        with progress(f"zeros of {text.name}, tokens", windows.tokens.size) as advance:
            counts = work.piece("counts", lambda w=windows, a=advance: counter.count(model, w.tokens, a))  # type: ignore[misc]
        searches = {
            name: ppl_p(model, windows, work, truncation=name, percents=plan.percents, scope=plan.scope, counter=counter)
            for name in (plan.truncations if calibration else ())
        }
        found.append(Analysis(
            data=text.name, sha256=text.sha256, window=plan.window, windows=len(windows.tokens), windows_total=windows.total,
            scope=plan.scope.tokens, keep_first=plan.scope.keep_first, activity=counter.activity(counts), searches=searches,
            not_run=not_run, calibration=calibration.describe() if calibration else {},
        ))  # fmt: skip
    return found


def activation_ratio(
    model: Model, *, text: EvaluationText, plan: Plan, directories: Sequence[Path], folder: Path | None = None
) -> float:
    """1 - the sparsity of a model at the plan's first p, by its first truncation, on one text.

    Raises:
      ConfigError: as `analyze`, and a model that cannot be searched.
    """
    first = replace(plan, percents=plan.percents[:1], truncations=plan.truncations[:1])
    found = analyze(model, [text], first, directories, folder=folder)[0]
    if found.not_run:
        raise ConfigError(found.not_run)
    return found.searches[first.truncations[0]].results[0].activation_ratio


def _unsearchable(model: Model, plan: Plan) -> str:
    """Why this model cannot be searched; bad options are refused instead."""
    if not plan.percents:
        return ""
    try:
        for truncation in plan.truncations:
            check_searchable(model.config, truncation, plan.percents)
    except ConfigError as error:
        if "have no dense FFN" not in str(error):
            raise
        return str(error)
    return ""


def _calibration(
    text: EvaluationText, windows: Windows, plan: Plan, tokenizer: Tokenizer, directories: Sequence[Path]
) -> Calibration:
    name, _, split = text.name.partition(":")
    own = f"{name}:calibration" if split == "evaluation" else "stdlib:calibration"
    spec = CalibrationSpec(plan.calibration or own, plan.calibration_windows, plan.window)
    calibration = calibrate(spec, tokenizer, directories)
    if not plan.allow_overlap:
        check_disjoint(calibration.shingles, list(windows.tokens), text.name)
    return calibration


def _nothing(windows: Windows) -> Calibration:
    """Stands for a calibration where nothing is fitted."""
    return Calibration(CalibrationSpec("", 0, windows.tokens.shape[1]), windows.tokens[:0], "")


def _sha256(model: Model) -> str:
    """Of the config and the parameters."""
    found = hashlib.sha256(repr(model.config).encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(model.values)[0]:
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8))
    return found.hexdigest()


def _key(identity: str, plan: Plan, windows: Windows, calibration: Calibration | None) -> str:
    """16 hexadecimal digits of all that kept pieces depend on; p and the truncation are in the pieces' own names."""
    protocol = {
        "model": identity,
        "windows": hashlib.sha256(np.ascontiguousarray(windows.tokens, "<i4").tobytes()).hexdigest(),
        "calibration": calibration.sha256 if calibration else "",
        "protocol": [plan.window, plan.union, plan.blocks, plan.scope.tokens, plan.scope.keep_first],
    }
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
