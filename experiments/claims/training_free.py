"""Claims of training-free activation sparsity, on SmolLM2: orderings and ratios, since a small model is fragile."""

from __future__ import annotations

from collections.abc import Callable

from experiments.claims.bench import Bench, Rows, gap
from experiments.claims.claim import Claim, Outcome

NEEDS = ("smollm2-135m",)
PROMPT = "from:0.5"


def below(*recipes: str, margin: float = 0.0, scope: str = "all") -> Callable[[Bench], Outcome]:
    """Each recipe's loss is below the next one's on every text, by `margin` nats and by two standard errors."""

    def measure(bench: Bench) -> Outcome:
        rows = {recipe: bench.compressed(recipe, scope=scope) for recipe in recipes}
        holds, parts, numbers = True, [], {}
        for text in bench.texts:
            parts.append(f"{text}: dense {rows[recipes[0]].dense_perplexity(text):.2f}")
            for better, worse in zip(recipes[:-1], recipes[1:], strict=True):
                difference = gap(rows[better], rows[worse], text)
                holds &= difference.mean < -max(margin, 2 * difference.error)
                parts.append(f"{better} {rows[better].perplexity(text):.2f} < {worse} {rows[worse].perplexity(text):.2f} "
                             f"({difference.mean:+.3f} +- {difference.error:.3f} nats)")
                numbers[f"{text}: {better} - {worse}"] = difference._asdict()
        return Outcome(holds, "; ".join([*parts, _sparsities(rows)]), numbers)

    return measure


def excess_at_most(share: float, ours: str, theirs: str) -> Callable[[Bench], Outcome]:
    """The perplexity that `ours` adds to dense is at most `share` of what `theirs` adds, on every text."""

    def measure(bench: Bench) -> Outcome:
        rows = {recipe: bench.compressed(recipe) for recipe in (ours, theirs)}
        added = {text: [rows[one].perplexity(text) - rows[one].dense_perplexity(text) for one in (ours, theirs)]
                 for text in bench.texts}
        shares = {text: first / second for text, (first, second) in added.items()}
        told = [f"{text}: {ours} +{added[text][0]:.2f}, {theirs} +{added[text][1]:.2f}, {shares[text]:.2f} of it"
                for text in bench.texts]
        holds = all(found <= share for found in shares.values())
        return Outcome(holds, "; ".join([*told, _sparsities(rows)]), {"shares": shares})

    return measure


def alike(first: str, second: str, within: float) -> Callable[[Bench], Outcome]:
    """Two recipes differ by at most `within` nats on every text."""

    def measure(bench: Bench) -> Outcome:
        rows = {recipe: bench.compressed(recipe) for recipe in (first, second)}
        gaps = {text: gap(rows[first], rows[second], text) for text in bench.texts}
        told = [f"{text}: {first} - {second} {found.mean:+.4f} +- {found.error:.4f} nats" for text, found in gaps.items()]
        holds = all(abs(found.mean) <= within for found in gaps.values())
        return Outcome(holds, "; ".join([*told, _sparsities(rows)]), {text: found._asdict() for text, found in gaps.items()})

    return measure


def ratio_at_most(limit: float, *recipes: str) -> Callable[[Bench], Outcome]:
    """The best of the recipes has at most `limit` times the dense perplexity on every text."""

    def measure(bench: Bench) -> Outcome:
        rows = {recipe: bench.compressed(recipe) for recipe in recipes}
        ratios = {text: {recipe: row.ratio(text) for recipe, row in rows.items()} for text in bench.texts}
        told = [f"{text}: " + ", ".join(f"{recipe} {value:.3f}" for recipe, value in sorted(found.items(), key=lambda i: i[1]))
                for text, found in ratios.items()]
        holds = all(min(found.values()) <= limit for found in ratios.values())
        return Outcome(holds, "; ".join([*told, _sparsities(rows)]), ratios)

    return measure


def at_zero(*recipes: str) -> Callable[[Bench], Outcome]:
    """At sparsity 0 the losses are those of the dense model, bit for bit."""

    def measure(bench: Bench) -> Outcome:
        same = {}
        for recipe in recipes:
            found = bench.compressed(recipe)
            ours, dense = (row["results"] for row in (found.row, found.dense))
            same[recipe] = all(a["values"] == b["values"] for a, b in zip(ours, dense, strict=True))
        return Outcome(all(same.values()), ", ".join(f"{r}: {'equal' if s else 'DIFFERS'}" for r, s in same.items()), same)

    return measure


def _sparsities(rows: dict[str, Rows]) -> str:
    told = (f"{recipe} {100 * row.sparsity:.1f} % / {row.bytes:.3f}" for recipe, row in rows.items())
    return "model sparsity / bytes per token " + ", ".join(told)


TEAL = "TEAL (Liu et al., 2024, arXiv 2408.14690)"
WINA = "WINA (Chen et al., 2025, arXiv 2505.19427)"
LAROSA = "La RoSA (Liu et al., 2025, arXiv 2507.01299)"
RSPARSE = "R-Sparse (Zhang et al., 2025, arXiv 2504.19449)"
COREINFER = "CoreInfer (Wang et al., 2024, arXiv 2410.18311)"
GRIFFIN = "GRIFFIN (Dong et al., 2024, arXiv 2404.01365)"

ALL_LINEAR = ("topk:0.5", "teal:0.5", "wina:0.5,uniform", "rsparse:0.5,rho=1", "larosa:0.5,uniform")

CLAIMS = [
    Claim("sparsity_zero", "all", "at sparsity 0 every method is the dense model", "equal losses, bit for bit",
          at_zero("teal:0", "topk:0", "wina:0,uniform", "cats:0", "chess:0"), 3, needs=NEEDS),
    Claim("teal_threshold", TEAL, "thresholds lose about what exact top-k of the same score loses, at 50 %",
          "within .08 nats", alike("teal:0.5,threshold,uniform", "topk:0.5", 0.08), 3, needs=NEEDS),
    Claim("teal_greedy", TEAL, "greedy allocation within blocks loses less than uniform sparsity, at 50 %",
          "below, by two standard errors", below("teal:0.5", "teal:0.5,threshold,uniform"), 9, needs=NEEDS),
    Claim("wina_score", WINA, "weighting |x| by the weight's norm is better than |x| alone, at 50 %, in the canonical basis",
          "below, by two standard errors", below("wina:0.5,uniform", "topk:0.5"), 3, needs=NEEDS),
    Claim("wina_rotation", WINA, "the released rotation hurts a small model with grouped queries, at 50 %",
          "above the score alone, by .2 nats", below("wina:0.5,uniform", "wina_rotated:0.5,uniform", margin=0.2), 4,
          needs=NEEDS),
    Claim("larosa_excess", LAROSA, "principal components take most of the added perplexity away, at 50 %",
          "at most .6 of what top-k adds", excess_at_most(0.6, "larosa:0.5,uniform", "topk:0.5"), 4, needs=NEEDS),
    Claim("rsparse_order", RSPARSE, "on a small model every byte given to the low-rank part costs more than it brings, at 50 %",
          "rho 1 < .9 < .5", below("rsparse:0.5,rho=1", "rsparse:0.5,rho=0.9", "rsparse:0.5,rho=0.5"), 8, needs=NEEDS),
    Claim("best_at_half", "all-linear methods", "the best published method at 50 % model sparsity, scope all",
          "at most 1.35 times dense", ratio_at_most(1.35, *ALL_LINEAR), 15, needs=NEEDS),
    Claim("griffin_order", GRIFFIN, "row-normalised activity of the prompt chooses better neurons than chance, half of them",
          "GRIFFIN < random, by 1 nat", below("griffin:0.5", "griffin:0.5,random", margin=1.0, scope=PROMPT), 5,
          needs=NEEDS),
    Claim("coreinfer_magnitude", COREINFER, "for a SiLU model votes by |h| are better than by signed h, half of the neurons",
          "below, by .5 nats", below("coreinfer:0.5", "coreinfer:0.5,signed=true", margin=0.5, scope=PROMPT), 5, needs=NEEDS),
    Claim("pruning_order", "SparseGPT (2301.00774), Wanda (2306.11695)", "half of the weights removed at once",
          "SparseGPT < Wanda < magnitude", below("sparsegpt:0.5", "wanda:0.5", "magnitude:0.5"), 12, needs=NEEDS),
    Claim("pruning_two_of_four", "Wanda (Sun et al., 2023, arXiv 2306.11695)", "2:4 costs more than 50 % without a pattern",
          "above, by .2 nats", below("wanda:0.5", "wanda:2:4", margin=0.2), 5, needs=NEEDS),
    Claim("structured", "Activation-based structured pruning (arXiv 2201.10520)", "30 % of the FFN neurons cut by mean |h|^2",
          "below random ones, by ln 3", below("structured:0.3", "structured:0.3,random", margin=1.0986), 4, needs=NEEDS),
]
