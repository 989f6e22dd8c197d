"""Run the claims of papers as computations, and print what was claimed, expected and measured, with a verdict.

    python -m experiments.claims                       # all, quick tier; resumes what an earlier call computed
    python -m experiments.claims teal_greedy larosa    # some
    python -m experiments.claims --fast                # those that CI runs: 3 minutes, no pretrained model
    python -m experiments.claims --list                # names and minutes, nothing is run

A verdict is `holds`, `fails` or `not run` (and why); it comes from the numbers of this run alone, and they stand on a page too,
`claims.md` in --out. Texts and models that are not there give `not run`. --full takes the full tier: all windows, more
calibration; hours on a CPU. Claims of trained methods train small models in --out, once for all claims that need them; the
minutes of --list are those of a claim that finds nothing there.
"""

from __future__ import annotations

import datetime
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import entry


@dataclass
class Flags:
    fast: bool = entry.flag(False, "only the fast ones")
    full: bool = entry.flag(False, "full tier instead of quick")
    list: bool = entry.flag(False, "print the claims and what they take")
    out: str = entry.flag("runs/claims", "folder that keeps what was computed")


def main(call: entry.Call[Flags]) -> Any:
    from experiments.claims.bench import Bench
    from experiments.claims.claim import judge, select
    from experiments.claims.registry import CLAIMS
    from sparsejax.train.metrics import replace_text

    flags = call.flags
    chosen = select(CLAIMS, call.names, flags.fast)
    if flags.list:
        print("\n".join(f"{claim.name:<28} {claim.minutes:5.1f} min  {claim.paper}" for claim in chosen))
        return [{"name": claim.name, "paper": claim.paper, "minutes": claim.minutes} for claim in chosen]
    share_compilations(Path(flags.out))
    bench = Bench(Path(flags.out), "full" if flags.full else "quick")
    records = []
    for number, claim in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {claim.name} (about {claim.minutes:g} minutes): {claim.claim}", flush=True)
        records.append(judge(claim, bench))
        print(_told(records[-1]), flush=True)
        replace_text(Path(flags.out) / "claims.md", page(records, call.command))
    counts = {verdict: sum(record["verdict"] == verdict for record in records) for verdict in ("holds", "fails", "not run")}
    print(f"{len(records)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return records


def share_compilations(folder: Path) -> None:
    """Runs of one shape share their programs, and most seconds of a small run are compilation."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str((folder / "xla").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def page(records: list[dict[str, Any]], command: str) -> str:
    """The records as a Markdown page: those that hold, then those that do not."""
    heads = ("claim", "expected", "measured", "paper")
    lines = ["# What papers claim, computed here", "", f"`{command}`, {datetime.date.today()}.", ""]
    for verdict in ("holds", "fails", "not run"):
        found = [record for record in records if record["verdict"] == verdict]
        if found:
            rows = [heads, ("---",) * len(heads)]
            rows += [(f"**{one['name']}**: {one['claim']}", *(one[name] for name in heads[1:])) for one in found]
            escaped = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
            lines += [f"## {verdict.capitalize()}: {len(found)}", "", *(f"| {row} |" for row in escaped), ""]
    return "\n".join(lines)


def _told(record: dict[str, Any]) -> str:
    lines = [f"  {record['verdict'].upper()} after {record['seconds']:.0f} s"]
    for name in ("paper", "expected", "measured"):
        lines += textwrap.wrap(f"{name}: {record[name]}", 124, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    entry.run(main, Flags, config=False, names="claim")
