"""OHQ: formats under a budget of time that was measured on the chip where the model will run.

"On-Chip Hardware-Aware Quantization" (Huang et al., 2023, arXiv 2309.01945). A bit allocator: losses of single maps by KL
(`methods.quant.zeroq`, on calibration text), and

    sum_i t(shape of W_i, format of W_i) <= budget        t: seconds of one product of that shape in that format

with t read from a table that `python -m experiments.bench formats` measures on this device. The plan is the best one under that
budget and those of size (`3.5ms,4.25bits`), exactly. Where times are proportional to sizes it is the plan for the size.
The paper estimates losses from masked forward passes on the chip, which is left out, as is energy.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from sparsejax.compress.bit_allocation import parse_budget
from sparsejax.compress.bits import Budget
from sparsejax.compress.calibration import Calibration
from sparsejax.io.model import Model
from sparsejax.methods.quant.zeroq import Zeroq
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import rule_sites
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError, check

TABLE_VERSION = 1
MEASURE = "measure it with `python -m experiments.bench formats --model MODEL --formats MENU --json TABLE` on this device"


class CostTable(NamedTuple):
    """Times of products on one device.

    Fields:
      device: `device_name()` of where they were taken.
      jax: version. rows: of x at once.
      seconds: of one product, by (in, out, format).
    """

    device: str
    jax: str
    rows: int
    seconds: Mapping[tuple[int, int, str], float]


def device_name() -> str:
    """Platform and kind of the device that JAX computes on by default; of a CPU model and cores, which JAX does not tell."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.platform}: {device.device_kind}"
    listed = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", listed.read_text(), re.MULTILINE) if listed.exists() else None
    return f"cpu: {named[1] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def table_json(table: CostTable) -> dict[str, Any]:
    """A table as the JSON values that `read_table` reads."""
    rows = [{"in": key[0], "out": key[1], "format": key[2], "seconds": seconds} for key, seconds in table.seconds.items()]
    return {"format_times": TABLE_VERSION, "device": table.device, "jax": table.jax, "rows": table.rows, "times": rows}


def read_table(path: str) -> CostTable:
    """A table of times.

    Raises:
      ConfigError: no such file, or one that holds no times; names the file and what is wrong.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"ohq: table = {path!r}: cannot be read ({error}); {MEASURE}") from error
    version = found.get("format_times") if isinstance(found, dict) else None
    check(version == TABLE_VERSION, f"{path}: format_times", version, f"expected {TABLE_VERSION}; {MEASURE}")
    try:
        times = {(int(one["in"]), int(one["out"]), str(FormatSpec.parse(one["format"]))): float(one["seconds"])
                 for one in found["times"]}  # fmt: skip
        table = CostTable(str(found["device"]), str(found["jax"]), int(found["rows"]), times)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: times: not as the benchmark writes them ({error}); {MEASURE}") from error
    bad = [key for key, seconds in times.items() if not (np.isfinite(seconds) and seconds > 0)]
    check(not bad, f"{path}: seconds of", bad[:4], "must be positive numbers")
    return table


@dataclass(frozen=True)
class Ohq(Zeroq):
    """table: path of a table of times; data, seed, budget (also `ms`), menu, tied: see `Zeroq`."""

    budget: str = "10ms"
    data: str = "calibration"
    table: str = "results/bench_formats.json"
    units: ClassVar[tuple[str, ...]] = ("bits", "MB", "ms")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [unit for _, unit in parse_budget(self.budget, self.units, "ohq: budget")]
        check("ms" in given, "ohq: budget", self.budget, "names no time; give one such as 9ms, or 9ms,4.25bits (or use zeroq)")

    def budgets(self, config: ModelConfig, sites: Sequence[str]) -> list[Budget]:
        found = super().budgets(config, sites)
        for amount, unit in parse_budget(self.budget, self.units, f"{self.name}: budget"):
            if unit == "ms":
                found.append(Budget(f"{self.name}: ms", 1e3 * self._seconds(config, sites), amount))
        return found

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        super().check_inputs(model, calibration)
        measured, here = read_table(self.table).device, device_name()
        check(measured == here, f"{self.table}: device", measured, f"times of another device say nothing of {here}; {MEASURE}")

    def _seconds(self, config: ModelConfig, sites: Sequence[str]) -> np.ndarray:
        """float64[N, K]."""
        table, shapes = read_table(self.table), rule_sites(config)["weights"]
        wanted = {(*shapes[site], str(spec)) for site in sites for spec in self.specs}
        missing = sorted(wanted - set(table.seconds))
        check(not missing, f"{self.table}: times of (in, out, format)", missing[:2], f"are missing; {MEASURE}")
        return np.array([[table.seconds[(*shapes[site], str(spec))] for spec in self.specs] for site in sites])
