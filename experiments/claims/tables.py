"""The three tables of methods on SmolLM2, and the claim of our own method: orderings at equal sparsity and at equal bytes.

A method's rows at several levels are a line: the loss of each window against what the method realised, straight between rows,
the dense model at its beginning. Two methods are compared where one has a row, the other's line read at the same abscissa,
window by window. Losses grow faster than in proportion, so that a straight line says no less than the method would lose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.claims.bench import Bench, Rows
from experiments.claims.claim import Claim, Outcome
from experiments.claims.training_free import NEEDS, PROMPT, below
from sparsejax.evaluate.perplexity import Difference, paired_difference

LEVELS = (0.25, 0.4, 0.5, 0.65)
DOMINATED = LEVELS[1:]
GATE_LEVELS = (0.3, 0.5, 0.7)
SET_LEVELS = (0.25, 0.5)
PUBLISHED = ("topk:{}", "teal:{}", "wina:{},uniform", "rsparse:{},rho=1", "larosa:{},uniform")
ABSCISSAE: dict[str, Callable[[Rows], float]] = {"sparsity": lambda rows: rows.sparsity, "bytes": lambda rows: 1 - rows.bytes}


class Line(NamedTuple):
    """A method's rows by rising abscissa: abscissae [n] and losses [n, windows], the dense model first."""

    at: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Rows], abscissa: str, text: str) -> Line:
        """Of rows, for one text; rows that save nothing are left out."""
        found = sorted((ABSCISSAE[abscissa](one), index) for index, one in enumerate(rows))
        found = [(x, index) for x, index in found if x > 0]
        dense = np.asarray(next(r for r in rows[0].dense["results"] if r["data"] == text)["values"])
        losses = [dense, *(rows[index].losses(text) for _, index in found)]
        return cls(np.array([0.0, *(x for x, _ in found)]), np.array(losses))

    def __call__(self, x: float) -> np.ndarray | None:
        """Losses at x; None beyond the last row."""
        if not 0 <= x <= self.at[-1]:
            return None
        return np.array([np.interp(x, self.at, window) for window in self.losses.T])


def table(bench: Bench, recipes: Sequence[str], levels: Sequence[float], scope: str = "all") -> dict[str, list[Rows]]:
    """Rows of each recipe by level."""
    return {recipe: [bench.compressed(recipe.format(level), scope=scope) for level in levels] for recipe in recipes}


def told(rows: Mapping[str, Sequence[Rows]], texts: Sequence[str]) -> str:
    """For people: realised sparsity, relative bytes and perplexities of every row."""
    parts = []
    for recipe, found in rows.items():
        cells = [f"{100 * one.sparsity:.1f} % / {one.bytes:.3f}: " + ", ".join(f"{one.perplexity(text):.2f}" for text in texts)
                 for one in found]
        parts.append(f"{recipe.format('S')}: " + "; ".join(cells))
    first = next(iter(rows.values()))[0]
    dense = ", ".join(f"{text} {first.dense_perplexity(text):.2f}" for text in texts)
    return f"sparsity / bytes: perplexities. dense {dense}. " + ". ".join(parts)


def numbers(rows: Mapping[str, Sequence[Rows]], texts: Sequence[str]) -> dict[str, Any]:
    """The same as JSON values."""
    def cell(one: Rows) -> dict[str, float]:
        return {"sparsity": one.sparsity, "bytes": one.bytes, **{text: one.perplexity(text) for text in texts}}

    return {recipe: [cell(one) for one in found] for recipe, found in rows.items()}


def advantage(ours: Sequence[Rows], theirs: Rows, abscissa: str, text: str) -> Difference | None:
    """Our loss less theirs on the same windows, where they saved what they saved; None where our line does not reach."""
    here = Line.of(ours, abscissa, text)(ABSCISSAE[abscissa](theirs))
    return None if here is None else paired_difference(here, theirs.losses(text))


def dominates(ours: str, *abscissae: str) -> Callable[[Bench], Outcome]:
    """A method of ours against every published one: below it on every text where it saved as much."""

    def measure(bench: Bench) -> Outcome:
        others = table(bench, PUBLISHED, DOMINATED)
        line = table(bench, (ours,), (*DOMINATED, 0.7))[ours]
        gaps = {
            f"{recipe.format(level)}, equal {abscissa}, {text}": advantage(line, theirs, abscissa, text)
            for recipe, rows in others.items() for level, theirs in zip(DOMINATED, rows, strict=True)
            for abscissa, text in itertools.product(abscissae, bench.texts)
        }  # fmt: skip
        return _judged(gaps, {ours: line, **others}, bench.texts)

    return measure


def refines(base: str, *recipes: str) -> Callable[[Bench], Outcome]:
    """Each recipe's loss is below the base's, where the base saved what it did, at every level and on every text."""

    def measure(bench: Bench) -> Outcome:
        rows = table(bench, (base, *recipes), LEVELS)
        gaps = {
            f"{recipe.format('S')} against {base.format(level)}, {text}": advantage(rows[recipe], theirs, "sparsity", text)
            for recipe in recipes for level, theirs in zip(LEVELS, rows[base], strict=True) for text in bench.texts
        }  # fmt: skip
        return _judged(gaps, rows, bench.texts)

    return measure


def _judged(gaps: Mapping[str, Difference | None], rows: Mapping[str, Sequence[Rows]], texts: Sequence[str]) -> Outcome:
    """Whether all gaps are known and negative, with those that are not, and all rows."""
    lost = [f"{name} " + (f"{gap.mean:+.3f} +- {gap.error:.3f}" if gap else "out of reach")
            for name, gap in gaps.items() if gap is None or gap.mean >= 0]
    known = [gap.mean for gap in gaps.values() if gap]
    summary = f"{len(gaps) - len(lost)} of {len(gaps)} comparisons below, gaps {min(known):+.3f} to {max(known):+.3f} nats"
    measured = "; ".join([summary, *(["not below: " + ", ".join(lost)] if lost else [])])
    values = {name: gap and gap._asdict() for name, gap in gaps.items()}
    return Outcome(not lost, f"{measured}. {told(rows, texts)}", {"gaps": values, "rows": numbers(rows, texts)})


def ordered(recipes: Sequence[str], levels: Sequence[float], scope: str = "all") -> Callable[[Bench], Outcome]:
    """At every level and on every text each recipe's loss is below the next one's, by two standard errors."""

    def measure(bench: Bench) -> Outcome:
        rows, wrong = table(bench, recipes, levels, scope), []
        for better, worse in zip(recipes[:-1], recipes[1:], strict=True):
            for level, a, b in zip(levels, rows[better], rows[worse], strict=True):
                for text in bench.texts:
                    gap = paired_difference(a.losses(text), b.losses(text))
                    if gap.mean >= -2 * gap.error:
                        names = f"{better.format(level)} - {worse.format(level)} on {text}"
                        wrong.append(f"{names} {gap.mean:+.3f} +- {gap.error:.3f}")
        measured = ("not below: " + ", ".join(wrong) + ". ") if wrong else ""
        return Outcome(not wrong, measured + told(rows, bench.texts), {"wrong": wrong, "rows": numbers(rows, bench.texts)})

    return measure


GATES = ("chess:{}", "cats:{}")
SETS = ("griffin:{}", "coreinfer:{},signed=true,dense_first=0,dense_last=0", "griffin:{},random")  # of the same layers

CLAIMS = [
    Claim("all_linear", "TEAL, WINA, R-Sparse, La RoSA", "what each changes is better than the k largest |x| at every map, 25, "
          "40, 50 and 65 %", "lower loss at equal sparsity, on every text", refines(*PUBLISHED), 25, needs=NEEDS),
    Claim("isocline", "Isocline (this project)", "thresholds at equal marginal loss, against every published all-linear method "
          "at 40, 50 and 65 %", "lower loss at equal sparsity and at equal bytes, on every text",
          dominates("isocline:{}", *ABSCISSAE), 30, needs=NEEDS),
    Claim("isocline_refit", "Isocline, Refit (this project)", "the same with weights that make up for what is dropped",
          "lower loss at equal sparsity and at equal bytes, on every text", dominates("refit:isocline:{}", *ABSCISSAE), 15,
          needs=NEEDS),
    Claim("refit", "Refit (this project)", "refitted weights lose less at the same shares, at 50 %",
          "below, by two standard errors", below("refit:isocline:0.5", "isocline:0.5"), 3, needs=NEEDS),
    Claim("refit_teal", "Refit (this project)", "the same at TEAL's shares, at 50 %", "below, by two standard errors",
          below("refit:teal:0.5", "teal:0.5"), 3, needs=NEEDS),
    Claim("chess", "CHESS (He et al., 2024, arXiv 2409.01366)", "thresholds by channel are better than one for all, .3, .5 and "
          ".7 of the neurons off", "below CATS at each, by two standard errors", ordered(GATES, GATE_LEVELS), 8, needs=NEEDS),
    Claim("sequence_sets", "GRIFFIN (2404.01365), CoreInfer (2410.18311)", "sets chosen from a prompt, .25 and .5 of the "
          "neurons off", "GRIFFIN < CoreInfer with signed votes < random", ordered(SETS, SET_LEVELS, PROMPT), 7, needs=NEEDS),
]
