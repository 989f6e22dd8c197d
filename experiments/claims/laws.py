"""Claims about how sparse activations are at one rise of the perplexity (PPL-1 %, by CETT), on the models of `trained`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from experiments.claims.bench import Bench, Truncated
from experiments.claims.claim import Claim, Outcome
from experiments.claims.trained import SIZE, excess, numbers, scratch, told

# A run without decay, so that its checkpoints differ in data alone.
LONG = {"steps": 800, "optimizer__schedule": "constant", "optimizer__learning_rate": 2e-3, "checkpoint__every": 100,
        "checkpoint__keep": 8}  # fmt: skip
STEPS = (100, 200, 400, 800)


def along(bench: Bench, activation: str) -> list[Truncated]:
    """A gated model of `LONG` at its checkpoints `STEPS`."""
    run = scratch(bench, "tiny_swiglu", model__ffn__activation=activation, **LONG)
    return [bench.ppl_p(run, step=step) for step in STEPS]


def sparsing_law(bench: Bench) -> Outcome:
    """Exact zeros of ReGLU and PPL-1 % sparsity of SwiGLU along training."""
    rectified, smooth = along(bench, "reglu"), along(bench, "swiglu")
    change, error = smooth[-1].sparsity - smooth[0].sparsity, spread_of(smooth)
    holds = all(a.zeros < b.zeros for a, b in itertools.pairwise(rectified)) and change < -2 * error
    measured = (f"at steps {', '.join(map(str, STEPS))} of 1,024 bytes: ReGLU {shares(one.zeros for one in rectified)} exact "
                f"zeros; SwiGLU {shares(one.sparsity for one in smooth)} at PPL-1 % (change {100 * change:+.1f} +- "
                f"{100 * error:.1f})")
    found = {"reglu_zeros": [one.zeros for one in rectified], "swiglu_ppl_1": [one.sparsity for one in smooth]}
    return Outcome(holds, measured, found)


def one_metric(bench: Bench) -> Outcome:
    """PPL-1 % sparsity of ReGLU along training."""
    found = along(bench, "reglu")
    change, error = found[-1].sparsity - found[0].sparsity, spread_of(found)
    measured = (f"at steps {', '.join(map(str, STEPS))} of 1,024 bytes: {shares(one.sparsity for one in found)} "
                f"(change {100 * change:+.1f} +- {100 * error:.1f})")
    return Outcome(change > 2 * error, measured, {"reglu_ppl_1": [one.sparsity for one in found]})


def activation_gap(bench: Bench) -> Outcome:
    """PPL-1 % activation ratios at the end of training."""
    rectified, smooth = along(bench, "reglu")[-1], along(bench, "swiglu")[-1]
    holds = 1 - rectified.sparsity < 0.25 and 1 - smooth.sparsity > 0.4
    measured = f"after {STEPS[-1]} steps ReGLU {rectified}, SwiGLU {smooth}"
    return Outcome(holds, measured, {"reglu": 1 - rectified.sparsity, "swiglu": 1 - smooth.sparsity})


def spread_of(found: list[Truncated]) -> float:
    """Standard error of the change from the first to the last."""
    return math.hypot(*((one.high - one.low) / 2 for one in (found[0], found[-1])))


def shares(values: Iterable[float]) -> str:
    """`51.3, 55.7 %`."""
    return ", ".join(f"{100 * value:.1f}" for value in values) + " %"


def squared(bench: Bench) -> Outcome:
    """Squared ReLU against ReLU: loss, exact zeros and PPL-1 % zeros."""
    ours, plain = scratch(bench, "tiny_relu2"), scratch(bench, "tiny_relu2", model__ffn__activation="relu")
    cut, cut_plain = bench.ppl_p(ours), bench.ppl_p(plain)
    holds = excess(ours, plain) <= 1 and cut.sparsity >= cut_plain.sparsity
    measured = (f"{told('ReLU', plain)}, {cut_plain} at PPL-1 %; {told('squared ReLU', ours, plain)} of it, {cut} at PPL-1 %")
    return Outcome(holds, measured, {**numbers(relu=plain, relu2=ours), "ppl_1": [cut_plain.sparsity, cut.sparsity]})


LAW = "Sparsing Law (Luo et al., 2024, arXiv 2411.02335)"
LAW_SIZE = f"{SIZE}, {STEPS[-1]} steps"

CLAIMS = [
    Claim("sparsing_law", LAW, f"zeros of ReGLU grow with training data, PPL-1 % sparsity of SwiGLU shrinks ({LAW_SIZE})",
          "zeros grow at every step measured; SwiGLU's shrinks by two standard errors", sparsing_law, 2.5),
    Claim("sparsing_law_ppl", LAW, f"ReGLU's PPL-1 % sparsity grows as well ({LAW_SIZE})", "grows by two standard errors",
          one_metric, 1.3),
    Claim("sparsing_law_gap", LAW, f"the activation ratio at PPL-1 % of ReGLU is far below SwiGLU's ({LAW_SIZE})",
          "below .25, and above .4", activation_gap, 2.5),
    Claim("relu2", "ReLU^2 Wins (2024, arXiv 2402.03804)", f"squared ReLU is as sparse as ReLU or more ({SIZE})",
          "loss within 1 % of ReLU's or below, PPL-1 % sparsity not lower", squared, 1),
]
