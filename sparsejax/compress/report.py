"""Reports of compressions: `report.json` is what was measured; the tables for people are made of it, also of many together.

A report has a protocol (model, data, windows, scope: what rows must share to be compared) and rows, the dense model first. Two
tables and a line of speed are all there is to say of a row:

  quality  model sparsity as realised, perplexity with its standard error, times dense, paired difference of the loss; accuracy
  cost     bytes that decoding a token reads, extra bytes among them, ideal and measured speed-up, time and memory to compress
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsejax.evaluate.report import aligned
from sparsejax.plugs import ConfigError, check

NAME = "report.json"
FORMAT = 1
MISSING = "-"
Row = Mapping[str, Any]


class Table(NamedTuple):
    """Heads, and the cells of each row as text; the first column names the row."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def document(protocol: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """A report as JSON values: the dense row first, then the others by model sparsity; what is no number becomes null."""
    dense, *others = rows
    others.sort(key=lambda row: (row["sparsity"]["model"], row["label"]))
    return _plain({"format": FORMAT, "protocol": protocol, "rows": [dense, *others]})


def read(folder: Path) -> dict[str, Any]:
    """The report in a folder.

    Raises:
      ConfigError: there is none, or it is damaged or of another format.
    """
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{folder}: holds no {NAME} ({error.strerror}); is the compression finished?") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    good = isinstance(found, dict) and found.get("format") == FORMAT and {"protocol", "rows"} <= set(found)
    check(good and found["rows"], str(path), "report", f"is no report of format {FORMAT}")
    return found


def gather(folders: Sequence[Path]) -> dict[str, Any]:
    """One report of many that share a protocol; the dense row is the first one's.

    Raises:
      ConfigError: no folder, one given twice, one without a report, or protocols that differ (says in what).
    """
    check(folders, "report folders", "", "give the folders of finished compressions")
    resolved = [folder.resolve() for folder in folders]
    twice = sorted({str(folder) for folder in resolved if resolved.count(folder) > 1})
    check(not twice, "report folders", twice, "given twice")
    reports = [read(folder) for folder in folders]
    for folder, one in zip(folders, reports, strict=True):
        check_same_protocol(str(folder), one["protocol"], reports[0]["protocol"])
    rows = []
    for folder, one in zip(folders, reports, strict=True):
        dense = one["rows"][0].get("decode")  # speeds are compared within a run
        rows += [{"dense_decode": dense, "folder": str(folder), **row} for row in one["rows"][1:]]
    return document(reports[0]["protocol"], [reports[0]["rows"][0], *rows])


def check_same_protocol(name: str, found: Any, expected: Any) -> None:
    """Refuse numbers that must not stand in one table.

    Raises:
      ConfigError: names each part of the protocol that differs, with both values.
    """
    differing = _differences(_plain(found), _plain(expected), "")
    rule = f"differs, so that its numbers cannot stand beside the others: {'; '.join(differing)}"
    check(not differing, name, "protocol", rule)


def quality(report: Mapping[str, Any]) -> Table:
    """Sparsity and what it costs in perplexity and accuracy."""
    rows, data = report["rows"], report["protocol"]["data"]
    heads = ["", "requested", "model sparsity"]
    for one in data:
        if one["kind"] == "perplexity":
            heads += [f"{one['data']}: perplexity", "x dense", "loss - dense"]
        else:
            heads += [f"{one['data']}: acc", "acc - dense"]
    cells = []
    for row in rows:
        line = [row["label"], number(row["requested"], "{:.2f}"), percent(row["sparsity"]["model"])]
        for index in range(len(data)):
            line += _quality_cells(row["results"][index], rows[0]["results"][index])
        cells.append(line)
    return Table("Quality", heads, cells)


def cost(report: Mapping[str, Any]) -> Table:
    """Bytes, speed, and what the compression took."""
    heads = [
        "", "MB per token", "relative bytes", "extra MB", "cache kB", "zeros in weights", "ideal speed-up", "decode tokens/s",
        "measured speed-up", "seconds to compress", "peak GiB", "tier", "calibration",
    ]  # fmt: skip
    cells = []
    for row in report["rows"]:
        used, decode, spent = row["bytes"], row.get("decode"), row.get("cost") or {}
        peak, cache = spent.get("peak_bytes"), used.get("cache")  # reports of before caches had formats lack it
        cells.append([
            row["label"], f"{used['per_token'] / 1e6:.1f}", f"{used['relative']:.3f}", f"{used['extra'] / 1e6:.2f}",
            number(cache and cache / 1e3, "{:.2f}"), percent(row["weight_zeros"]), f"{row['ideal_speedup']:.2f}x",
            number(decode and decode["tokens_per_second"], "{:.1f}"), number(speedup(row, report["rows"][0]), "{:.2f}x"),
            number(spent.get("seconds"), "{:.0f}"), number(peak and peak / 2**30, "{:.2f}"), row.get("tier", MISSING),
            row.get("calibration", {}).get("sha256", MISSING)[:12],
        ])  # fmt: skip
    return Table("Cost", heads, cells)


def by_site(report: Mapping[str, Any]) -> Table:
    """Realised sparsity of each map of a block, mean over layers."""
    sites = list(report["rows"][0]["sparsity"]["sites"])
    cells = [[row["label"], *(percent(row["sparsity"]["sites"].get(site)) for site in sites)] for row in report["rows"]]
    return Table("Realised sparsity by site", ["", *sites], cells)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """All tables of a report."""
    return [quality(report), cost(report), by_site(report)]


def speedup(row: Row, dense: Row) -> float | None:
    """Measured decode speed over that of the dense model in the same run; None where it was not measured."""
    if row is dense or not row.get("decode"):
        return 1.0 if row is dense and row.get("decode") else None
    base = row.get("dense_decode") or dense.get("decode")
    return row["decode"]["tokens_per_second"] / base["tokens_per_second"] if base else None


def footnotes(report: Mapping[str, Any]) -> list[str]:
    """What the numbers mean and where they hold, in sentences."""
    protocol, rows = report["protocol"], report["rows"]
    parts = [_protocol_of(one) for one in protocol["data"]]
    lines = [
        f"Model {protocol['model']} ({protocol['dtype']}, weights {protocol['weights'][:12]}); scope {protocol['scope']}, "
        f"keep_first {protocol['keep_first']}; {'; '.join(parts)}.",
        "Model sparsity: share of the weights of the blocks' linear maps that a token does not need, as realised on these "
        "texts (embedding, head and norms out of it). +- are standard errors over windows; differences are paired by window.",
        "Bytes per token: everything read to decode one token, head, adapters and fitted arrays in, KV cache out; cache: "
        "what each token of the context adds to that. Ideal speed-up is dense bytes over bytes without a cache: the bound of "
        "batch-1 decoding on memory.",
    ]
    timed = [(row["decode"], row.get("device")) for row in rows if row.get("decode")]
    speeds = {(decode["executor"], device, decode["new_tokens"]) for decode, device in timed}
    for executor, device, tokens in sorted(speeds, key=str):
        lines.append(f"Measured: {tokens} tokens at batch 1 on {device}; executor {executor}; serving form; median of turns.")
    if any(row.get("allow_overlap") for row in rows):
        names = ", ".join(row["label"] for row in rows if row.get("allow_overlap"))
        lines.append(f"Overlap of calibration and evaluation was allowed for {names}: its quality is flattered.")
    return lines


def text(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    return "\n\n".join(aligned([table.heads, *table.rows]) for table in tables(report))


def markdown(report: Mapping[str, Any], plots: Sequence[tuple[str, str]]) -> str:
    """`report.md`; plots are (file, caption)."""
    rows = report["rows"]
    name = rows[1]["label"] if len(rows) == 2 else f"{len(rows) - 1} compressions"
    parts = [f"# {report['protocol']['model']}: {name}", *footnotes(report)]
    for table in tables(report):
        heads = [head or "model" for head in table.heads]
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *table.rows]
        parts += [f"## {table.title}", "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)]
    parts += [f"![{caption}]({file})\n\n{caption}" for file, caption in plots]
    parts.append("## Commands")
    for row in rows[1:]:
        made = [*row.get("passes", ()), *_versions(row)]
        parts.append(f"{row['label']}:\n\n```\n{row.get('command', '')}\n```\n\n" + "\n".join(f"- `{line}`" for line in made))
    return "\n\n".join(parts) + "\n"


def number(value: float | None, form: str) -> str:
    """Formatted, a dash where there is none."""
    return MISSING if value is None or not math.isfinite(value) else form.format(value)


def percent(value: float | None) -> str:
    """A share in per cent."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def _quality_cells(found: Row, dense: Row) -> list[str]:
    if found["kind"] == "perplexity":
        ratio = None if found is dense else found["perplexity"] / dense["perplexity"]
        difference = _with_error(found, "loss_difference", "{:+.4f}")
        return [_with_error(found, "perplexity", "{:.3f}"), number(ratio, "{:.3f}"), difference]
    return [_with_error(found, "acc", "{:.3f}"), _with_error(found, "acc_difference", "{:+.3f}")]


def _with_error(found: Row, name: str, form: str) -> str:
    if name not in found:
        return MISSING
    error = found[f"{name}_error"]
    return number(found[name], form) + (f" +- {number(error, form.replace('+', ''))}" if error is not None else "")


def _protocol_of(one: Row) -> str:
    if one["kind"] == "perplexity":
        return f"{one['data']}: {one['windows']:,} of {one['windows_total']:,} windows of {one['window']:,} tokens"
    return f"{one['data']}: {one['rows']:,} of {one['rows_total']:,} questions"


def _versions(row: Row) -> list[str]:
    versions = row.get("versions") or {}
    return [", ".join([*(f"{name} {version}" for name, version in versions.items()), str(row.get("device", ""))])]


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _differences(found: Any, expected: Any, path: str) -> list[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        names = list(dict.fromkeys([*found, *expected]))
        return [part for name in names for part in _differences(found.get(name), expected.get(name), f"{path}.{name}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [part for i, (ours, theirs) in pairs for part in _differences(ours, theirs, f"{path}[{i}]")]
    return [] if found == expected else [f"{path.lstrip('.')} {_short(found)} and {_short(expected)}"]


def _short(value: Any) -> str:
    written = json.dumps(value)
    return written if len(written) <= 60 else f"{written[:57]}..."


def _plain(value: Any) -> Any:
    """JSON values; nan and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
