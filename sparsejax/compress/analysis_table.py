"""Analyses as tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparsejax.compress.analysis import Analysis
from sparsejax.compress.ppl_p import Search
from sparsejax.evaluate.report import aligned
from sparsejax.evaluate.sparsing_law import LawFit
from sparsejax.evaluate.sparsity import COVERAGE, Activity, SiteActivity

HOT = 0.2  # share of units whose coverage is printed


class Table(NamedTuple):
    """Cells by row, the heads first; `note`: what stands below."""

    title: str
    rows: list[list[str]]
    note: str = ""


def describe(analysis: Analysis) -> str:
    """All that was measured on one text."""
    parts = [heading(analysis)]
    for table in tables(analysis):
        text = f"{table.title}:\n{aligned(table.rows)}"
        parts.append(f"{text}\n\n{table.note}" if table.note else text)
    if analysis.not_run:
        parts.append(f"PPL-p%: not run: {analysis.not_run}")
    return "\n\n".join(parts)


def heading(analysis: Analysis) -> str:
    """One line: the text and how much of it was counted."""
    scope = analysis.scope + (f", first {analysis.keep_first} dense" if analysis.keep_first else "")
    return (
        f"{analysis.data}: {analysis.windows:,} of {analysis.windows_total:,} windows of {analysis.window:,} tokens, "
        f"scope {scope}, {analysis.activity.tokens:,} tokens counted"
    )


def tables(analysis: Analysis) -> list[Table]:
    """What was measured on one text: zeros as the model is, PPL-p%, and the hidden vector under CETT at the first p."""
    found = [Table("Zeros as the model is", _activity(analysis.activity), _codes(analysis.activity))]
    if analysis.searches:
        found.append(_searches(list(analysis.searches.values())))
        cett = analysis.searches.get("cett")
        if cett:
            first = cett.results[0]
            found.append(Table(f"Under CETT at PPL-{first.percent:g} %", _activity(first.activity, ("mlp.down",))))
    return found


def describe_law(name: str, fit: LawFit) -> str:
    """One line for a fitted curve."""
    values = ", ".join(f"{key} = {value:.4g}" for key, value in fit.parameters.items())
    return (
        f"{name}: activation ratio {fit.ratio[0]:.4f} to {fit.ratio[-1]:.4f} over {fit.tokens[0]:.3g} to {fit.tokens[-1]:.3g} "
        f"tokens; {fit.law} law, {values}; A0 90 % {fit.low:.4f} to {fit.high:.4f}; residual {fit.residual:.4f}"
    )


def _activity(activity: Activity, only: Sequence[str] = ()) -> list[list[str]]:
    sites = {name: site for name, site in activity.sites.items() if not only or name in only}
    first = next(iter(sites.values()))
    unions, blocks = list(first.union or {}), list(first.occupancy or {})
    heads = ["site", "width", "zeros, %", "by layer", "dead units", "overlap", *(f"read at {size}" for size in unions)]
    heads += [f"blocks of {size}" for size in blocks] + [f"cov({HOT:g})"]
    return [heads, *(_row(name, site, unions, blocks) for name, site in sites.items())]


def _codes(activity: Activity) -> str:
    codes = activity.codes
    if codes is None:
        return ""
    distinct = f"{int(codes.distinct.min()):,} to {int(codes.distinct.max()):,}"
    return (
        f"codes of {codes.tokens:,} tokens: {distinct} distinct by layer, "
        f"{codes.distinct_all_layers:,} over all layers; redundancy {codes.redundancy.mean():.4f}; Hamming distance "
        f"{codes.hamming_neighbours.mean():.1f} bits of neighbours, {codes.hamming_random.mean():.1f} of random pairs"
    )


def _row(name: str, site: SiteActivity, unions: Sequence[int], blocks: Sequence[int]) -> list[str]:
    zeros = 100 * site.zero_fraction
    hot = site.coverage[:, COVERAGE.index(HOT)]
    return [
        name,
        f"{site.width:,}",
        f"{zeros.mean():.2f}",
        f"{zeros.min():.1f} to {zeros.max():.1f}",
        f"{int(site.dead_units.sum()):,}",
        _mean(site.overlap),
        *(_mean((site.union or {}).get(size)) for size in unions),
        *(_mean((site.occupancy or {}).get(size)) for size in blocks),
        _mean(hot),
    ]


def _mean(values: np.ndarray | None) -> str:
    return "-" if values is None or np.isnan(values).all() else f"{np.nanmean(values):.3f}"


def _searches(searches: Sequence[Search]) -> Table:
    heads = ["PPL-p%", "p", "sparsity, %", "low to high", "by layer", "loss rise", "target", "perplexity", "x"]
    rows = [heads]
    for search in searches:
        for found in search.results:
            layers = 100 * found.layers
            error = "" if math.isnan(found.error) else f" +- {found.error:.5f}"
            interval = "-" if math.isnan(found.low) else f"{100 * found.low:.1f} to {100 * found.high:.1f}"
            rows.append([
                search.truncation, f"{found.percent:g}", f"{100 * found.sparsity:.2f}", interval,
                f"{layers.min():.1f} to {layers.max():.1f}", f"{found.rise:+.5f}{error}", f"{found.target:.5f}",
                f"{found.perplexity:.3f}", f"{found.x:.4f}",
            ])  # fmt: skip
    points = ", ".join(f"{len(search.points)} by {search.truncation}" for search in searches)
    dense = f"dense perplexity {math.exp(searches[0].dense_loss):.3f}; points evaluated: {points}"
    falls = [search.cett_decreases for search in searches if search.cett_decreases is not None]
    monotone = f"; CETT fell along {falls[0]} steps of its grids" if falls else ""
    return Table("Sparsity of the hidden vector at a rise of the perplexity", rows, dense + monotone)
