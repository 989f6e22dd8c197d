"""Measure how sparse a model's activations are, and how sparse its FFN may be made at a given rise of the perplexity.

    python -m experiments.analyze --model smollm2-135m --data c4_sample,stdlib --out analysis
    python -m experiments.analyze --model runs/tiny_relu2 --data text:PATH --window 128 --ppl 1 --truncation cett,topk,fat
    python -m experiments.analyze --runs runs/a,runs/b --out laws

Counted on each text (those of experiments.evaluate), at the operand of every linear map and at the FFN's hidden vector: exact
zeros by layer and token position, dead units, overlap of neighbouring tokens, the union over a batch, occupied blocks, coverage
of the most active units; and the activation codes. PPL-p% (--ppl, "none" to leave it out) is the sparsity at which the
perplexity has risen by p per cent: all layers truncated at one CETT (cett), by top-k (topk), by a threshold on the gate (fat).
With --out there are index.html, plots and a JSON in the folder, and what was computed is not computed again.
--runs fits the Sparsing Law to the zeros that training runs have logged, or, with --data, to PPL-p% at their checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import entry
from sparsejax.plugs import ConfigError, check, check_choice

if TYPE_CHECKING:
    from sparsejax.compress import analysis
    from sparsejax.evaluate.texts import EvaluationText


@dataclass
class Flags:
    model: str = entry.flag("", "name or path of a model, a run folder included")
    data: tuple[str, ...] = entry.flag((), "texts: NAME or NAME:PATH, several separated by commas or repeated")
    runs: str = entry.flag("", "run folders separated by commas, to fit the Sparsing Law to")
    window: int = entry.flag(512, "tokens per window")
    limit: int = entry.flag(8, "windows of each text; 0: all")
    union: str = entry.flag("1,2,4,8,16", "batch sizes of the union")
    scope: str = entry.flag("all", "at which tokens activation sparsity acts: all, from:FRACTION or decode")
    keep_first: int = entry.flag(0, "first tokens of a window that stay dense")
    ppl: str = entry.flag("1,5,10", "p of PPL-p%, separated by commas, or none")
    truncation: str = entry.flag("cett", "what PPL-p% is searched by, of cett, topk, fat, separated by commas")
    calibration: str = entry.flag("", "text to fit truncations to; by default the text's calibration split, or stdlib's")
    allow_overlap: bool = entry.flag(False, "let calibration overlap the text")
    dtype: str = entry.flag("float32", entry.DTYPE)
    data_dir: str = entry.flag("", "data folder")
    out: str = entry.flag("", "folder for plots, analysis.json and kept work")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    check(bool(flags.model) != bool(flags.runs), "--model", flags.model, "give a model, or --runs, and not both")
    check(flags.data or flags.runs, "--data", "", "give the texts, e.g. c4_sample,stdlib")
    entry.computing_in(flags.dtype)
    check(flags.limit >= 0, "--limit", flags.limit, "must be 0 (all) or more")
    from sparsejax.data.sources import data_directories
    from sparsejax.evaluate.texts import TEXTS, open_text, split_specs

    plan, directories = _plan(flags), data_directories(flags.data_dir)
    texts: list[EvaluationText] = []
    for name, argument in split_specs(flags.data) if flags.data else ():
        check_choice("--data", name, TEXTS)
        texts.append(open_text(name, argument, directories))
    out = Path(flags.out) if flags.out else None
    measure = _runs if flags.runs else _model
    found = measure(flags, plan, texts, directories, out, call.command)
    result = {"model": flags.model, "runs": _names(flags.runs), "dtype": flags.dtype, "command": call.command, **found}
    if out:
        entry.write_json(out / "analysis.json", result)
        print(f"\n{out / 'analysis.json'}")
    return result


def _plan(flags: Flags) -> analysis.Plan:
    from sparsejax.compress.analysis import Plan
    from sparsejax.compress.ppl_p import TRUNCATIONS
    from sparsejax.evaluate.scope import Scope

    truncations = _names(flags.truncation)
    for name in truncations:
        check_choice("--truncation", name, TRUNCATIONS)
    percents = () if flags.ppl == "none" else _numbers(flags.ppl, "--ppl")
    check(not percents or min(percents) > 0, "--ppl", flags.ppl, "expected percentages above 0")
    return Plan(
        window=flags.window,
        limit=flags.limit,
        union=tuple(int(size) for size in _numbers(flags.union, "--union")),
        scope=Scope(flags.scope, flags.keep_first),
        percents=percents,
        truncations=truncations,
        calibration=flags.calibration,
        allow_overlap=flags.allow_overlap,
    )


def _model(
    flags: Flags, plan: analysis.Plan, texts: list[EvaluationText], directories: Sequence[Path], out: Path | None, command: str
) -> dict[str, Any]:
    from sparsejax.compress import analysis_html, analysis_plots, analysis_table
    from sparsejax.compress.analysis import analyze
    from sparsejax.io.load import load

    found = analyze(load(flags.model, dtype=flags.dtype), texts, plan, directories, folder=out)
    print("\n\n\n".join(map(analysis_table.describe, found)))
    if out:
        pictures = analysis_plots.write(found, out / "plots")
        print("", *pictures, analysis_html.write(out / "index.html", flags.model, found, {}, pictures, command), sep="\n")
    return {"results": found}


def _runs(
    flags: Flags, plan: analysis.Plan, texts: list[EvaluationText], directories: Sequence[Path], out: Path | None, command: str
) -> dict[str, Any]:
    """Laws of the runs' logs, or of PPL-p% (the first p and truncation) on the first text at their checkpoints."""
    from sparsejax.compress import analysis_html, analysis_plots, analysis_table
    from sparsejax.compress.analysis import activation_ratio
    from sparsejax.compress.run_laws import checkpoint_ratios, fit_runs, logged_ratios

    check(len(texts) <= 1, "--data", flags.data, "runs are measured on one text")
    check(not texts or plan.percents, "--ppl", flags.ppl, "with --data, runs are measured at a p")
    folders = [Path(name) for name in _names(flags.runs)]
    if texts:
        measured = functools.partial(activation_ratio, text=texts[0], plan=plan, directories=directories, folder=out)
        ratios = [checkpoint_ratios(folder, measured) for folder in folders]
    else:
        ratios = [logged_ratios(folder) for folder in folders]
    fits, line = fit_runs(ratios)
    for name, fit in fits.items():
        print(analysis_table.describe_law(name, fit))
    if line is not None:
        print(f"width / depth: slope {line.slope:+.3g} (90 % {line.low:+.3g} to {line.high:+.3g}), at 0 {line.intercept:.4f}")
    if out:
        picture = analysis_plots.write_laws(fits, out / "plots")
        page = analysis_html.write(out / "index.html", "Sparsing Law of runs", [], fits, [picture], command)
        print(picture, page, sep="\n")
    return {"laws": fits, "width_depth": line}


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str, flag: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in _names(text))
    except ValueError:
        found = ()
    if not found:
        raise ConfigError(f"{flag} = {text!r}: expected numbers separated by commas")
    return found


if __name__ == "__main__":
    entry.run(main, Flags, config=False)
