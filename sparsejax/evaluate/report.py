"""Evaluation records as a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Table = Sequence[Sequence[str]]


def describe(records: Sequence[dict[str, Any]]) -> str:
    """Texts first, then tasks, each as a table with standard errors; a baseline adds columns. See `suite.evaluate`."""
    texts = [record for record in records if record["kind"] == "perplexity"]
    tasks = [record for record in records if record["kind"] != "perplexity"]
    paired = bool(records) and "baseline" in records[0]
    parts = []
    if texts:
        heads = ["text", "windows", "loss", "perplexity", "bits per byte"]
        parts.append(aligned([heads + ["baseline", "loss - baseline"] * paired, *map(_text_row, texts)]))
    if tasks:
        heads = ["task", "rows", "acc", "acc_norm", "perplexity", "truncated"]
        parts.append(aligned([heads + ["baseline acc", "acc - baseline"] * paired, *map(_task_row, tasks)]))
    return "\n\n".join(parts)


def _text_row(record: dict[str, Any]) -> list[str]:
    windows = f"{record['windows']:,} of {record['windows_total']:,} x {record['window']:,}"
    row = [record["data"], windows, *(measured(record, name, digits) for name, digits in TEXT_COLUMNS)]
    if "baseline" in record:
        row += [measured(record["baseline"], "perplexity", 3), measured(record["baseline"], "loss_difference", 5, signed=True)]
    return row


def _task_row(record: dict[str, Any]) -> list[str]:
    rows = f"{record['rows']:,} of {record['rows_total']:,}"
    row = [record["data"], rows, *(measured(record, name, digits) for name, digits in TASK_COLUMNS), f"{record['truncated']:,}"]
    if "baseline" in record:
        row += [measured(record["baseline"], "acc", 4), measured(record["baseline"], "acc_difference", 4, signed=True)]
    return row


TEXT_COLUMNS = (("loss", 4), ("perplexity", 3), ("bits_per_byte", 4))
TASK_COLUMNS = (("acc", 4), ("acc_norm", 4), ("perplexity", 3))


def measured(record: dict[str, Any], name: str, digits: int, signed: bool = False) -> str:
    """`value +- standard error`; a dash where the record has no such number."""
    if name not in record:
        return "-"
    value, error = record[name], record[f"{name}_error"]
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text if math.isnan(error) else f"{text} +- {error:.{digits}f}"


def aligned(rows: Table) -> str:
    """Columns of text two blanks apart, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)
