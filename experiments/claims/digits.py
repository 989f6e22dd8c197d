"""Claims about small ReLU networks (64, 300, 100 and 10 units, no biases) on scikit-learn's 8 x 8 digits: seconds each.

Trained by SGD on 1,438 images, judged by 359 held-out ones; means over `SEEDS`, which draw weights and batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims.bench import Bench
from experiments.claims.claim import Claim, Outcome
from sparsejax.data.vision import DigitImages
from sparsejax.methods.pruning.activate_while_pruning import dead_rate, mlp_trainer, prune_while_training, relu_mlp
from sparsejax.methods.pruning.pattern import Pattern
from sparsejax.methods.pruning.relative_importance import contributions
from sparsejax.methods.sparsity.delta import DeltaLinear
from sparsejax.methods.sparsity.proact import clip_to_zero, flip_bits

SEEDS = (0, 1, 2, 3, 4)
WIDTHS = (64, 300, 100, 10)
CYCLES = 14  # of 20 % each: 94.5 % of the weights are gone in the last
PRUNED = "0.75"
FLIPS, FAULTS, STEEPNESS, MARGIN = 1e-5, 20, 20.0, 1.2
FRAMES = 16  # in which one digit fades into the next
THETAS = (0.2, 0.4, 0.8, 1.2)

Network = dict[str, np.ndarray]


@functools.cache
def images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> (float32[N, 64] in [0, 1], labels[N])."""
    loaded = DigitImages().load()
    return {split: (x.reshape(len(x), -1).astype(np.float32) / 16, labels) for split, (x, labels) in loaded.items()}


def drawn(seed: int) -> Network:
    """Initial kernels."""
    rng = np.random.default_rng(seed)
    shapes = zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
    return {str(i): (rng.normal(size=s) * (2 / s[0]) ** 0.5).astype(np.float32) for i, s in enumerate(shapes)}


@functools.cache
def trained(seed: int) -> Network:
    """A dense network after 300 steps."""
    start = drawn(seed)
    return dict(mlp_trainer(*images()["train"], seed=seed)(start, {name: np.ones(w.shape, bool) for name, w in start.items()}))


def accuracy(network: Network) -> float:
    """In per cent, on the held-out images."""
    x, labels = images()["evaluation"]
    return 100 * float(np.mean(np.asarray(relu_mlp(network, x)[0]).argmax(1) == labels))


def mean_and_error(values: np.ndarray) -> str:
    """`+.2 +- .2`, over seeds."""
    return f"{values.mean():+.3g} +- {values.std(ddof=1) / len(values) ** 0.5:.2g}"


@functools.cache
def cycles(activation_rate: float) -> dict[str, np.ndarray]:
    """Accuracy and dead rates by seed, after the last cycle of pruning."""
    found: dict[str, list[float]] = {"accuracy": [], "dynamic": [], "static": []}
    for seed in SEEDS:
        train = mlp_trainer(*images()["train"], seed=seed)
        *_, last = prune_while_training(drawn(seed), train, CYCLES, activation_rate=activation_rate)
        network = dict(last.trained)
        hidden = np.concatenate([np.asarray(h) for h in relu_mlp(network, images()["evaluation"][0])[1]], axis=1)
        rate = dead_rate(hidden)
        for name, value in (("accuracy", accuracy(network)), ("dynamic", rate.dynamic), ("static", rate.static)):
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def dead_units(bench: Bench) -> Outcome:
    """The dynamic dead rate with and without the activation step."""
    with_step, without = cycles(0.02), cycles(0.0)
    change = with_step["dynamic"] - without["dynamic"]
    measured = (f"dynamic dead rate {without['dynamic'].mean():.3f} without, {with_step['dynamic'].mean():.3f} with the step "
                f"({mean_and_error(change)}); static {without['static'].mean():.3f} and {with_step['static'].mean():.3f}")
    return Outcome(bool((change < 0).all()), measured, {"change": change.tolist()})


def pruned_accuracy(bench: Bench) -> Outcome:
    """Accuracy with and without the activation step."""
    with_step, without = cycles(0.02), cycles(0.0)
    change = with_step["accuracy"] - without["accuracy"]
    measured = (f"accuracy {without['accuracy'].mean():.2f} % without, {with_step['accuracy'].mean():.2f} % with the step "
                f"({mean_and_error(change)} points)")
    return Outcome(bool(change.mean() >= 0.5), measured, {"change": change.tolist()})


def by_share(bench: Bench) -> Outcome:
    """Three quarters of each layer's weights removed at once: by the mean of R, by its mean and three deviations, by size."""
    scores: dict[str, Callable[[jax.Array, np.ndarray], np.ndarray]] = {
        "mean share": lambda x, kernel: contributions(x, kernel).score(0),
        "mean + 3 deviations": lambda x, kernel: contributions(x, kernel).score(3),
        "magnitude": lambda x, kernel: np.abs(kernel),
    }
    falls = {name: np.array([_fall(trained(seed), score) for seed in SEEDS]) for name, score in scores.items()}
    ours = min(found.mean() for name, found in falls.items() if name != "magnitude")
    measured = "accuracy falls by " + ", ".join(f"{mean_and_error(found)} points ({name})" for name, found in falls.items())
    return Outcome(bool(ours <= 2 and ours < falls["magnitude"].mean()), measured, {n: v.tolist() for n, v in falls.items()})


def _fall(network: Network, score: Callable[[jax.Array, np.ndarray], np.ndarray]) -> float:
    """Points of accuracy that go with the weights of lowest score; each layer is fed by the pruned ones before it."""
    left, x = {}, jnp.asarray(images()["train"][0])
    for layer, kernel in network.items():
        keep = Pattern.parse(PRUNED).keep(jnp.asarray(score(x, kernel)), "layer")
        left[layer] = np.where(np.asarray(keep), kernel, 0)
        x = jax.nn.relu(x @ jnp.asarray(left[layer]))
    return accuracy(network) - accuracy(left)


def flipped_bits(bench: Bench) -> Outcome:
    """Accuracy under flips of stored bits in all kernels: plain, bounded by clipping to the bound, and to zero (ProAct)."""
    found = np.concatenate([_under_faults(seed) for seed in SEEDS])
    names = ("plain", "to the bound", "to zero")
    means = dict(zip(names, found.mean(axis=0).tolist(), strict=True))
    worst = dict(zip(names, np.quantile(found, 0.05, axis=0).tolist(), strict=True))
    clean = float(np.mean([accuracy(trained(seed)) for seed in SEEDS]))
    holds = means["to zero"] >= means["plain"] + 10 and means["to zero"] >= means["to the bound"]
    parts = [f"{name} {means[name]:.1f} % (5th percentile {worst[name]:.1f})" for name in names]
    return Outcome(holds, f"without faults {clean:.1f} %; {', '.join(parts)}", {"mean": means, "fifth_percentile": worst})


def _under_faults(seed: int) -> np.ndarray:
    """Accuracy in per cent [FAULTS, 3] with activations left alone, clipped to their bounds, and to zero."""
    network = {name: jnp.asarray(kernel) for name, kernel in trained(seed).items()}
    bounds = [MARGIN * jnp.max(hidden) for hidden in relu_mlp(network, images()["train"][0])[1]]
    x, labels = (jnp.asarray(a) for a in images()["evaluation"])

    def one(key: jax.Array) -> jax.Array:
        faulty = flip_bits(key, network, FLIPS)
        return jnp.stack([right(faulty, lambda h, _: h), right(faulty, lambda h, bound: jnp.minimum(jnp.nan_to_num(h), bound)),
                          right(faulty, lambda h, bound: clip_to_zero(h, bound, STEEPNESS))])

    def right(faulty: dict[str, jax.Array], clip: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        h = x
        for layer, bound in enumerate(bounds):
            h = clip(jax.nn.relu(h @ faulty[str(layer)]), bound)
        return 100 * jnp.mean(jnp.argmax(h @ faulty[str(len(bounds))], axis=-1) == labels)

    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(seed), FAULTS)))


def slow_streams(bench: Bench) -> Outcome:
    """Zeros of the changes of a slow and of a white stream of equal variance, so of equal error at one theta."""
    rng, zeros, errors = np.random.default_rng(0), {}, {}
    theta, w = jnp.float32(0.5), jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    for name, rho in (("slow", 0.99), ("white", 0.0)):
        frames = [rng.standard_normal((8, 64))]
        for _ in range(400):
            frames.append(rho * frames[-1] + (1 - rho**2) ** 0.5 * rng.standard_normal((8, 64)))
        x = jnp.asarray(np.stack(frames), jnp.float32)
        streamed = DeltaLinear()(x, w, theta)
        zeros[name] = float(streamed.zeros[1:].mean())
        errors[name] = float(jnp.linalg.norm(streamed.outputs - x @ w) / jnp.linalg.norm(x @ w))
    measured = "; ".join(f"{name} {100 * zeros[name]:.1f} % zeros at a relative error of {errors[name]:.3f}" for name in zeros)
    return Outcome(zeros["slow"] >= 2 * zeros["white"], measured, {"zeros": zeros, "errors": errors})


def fading_digits(bench: Bench) -> Outcome:
    """A stream in which each held-out digit fades into the next, through delta layers and frame by frame.

    theta is a share of each input's deviation: the largest of `THETAS` that keeps training digits within half a point. At a
    share of .1, unfitted, 1.8 times fewer rows are read.
    """
    rows: dict[str, list[float]] = {"frame by frame": [], "changes": []}
    falls, chosen = [], []
    for seed in SEEDS:
        streams = [_streamed(trained(seed), *_fading(*images()["train"], 150), share) for share in THETAS]
        share = max((s for s, found in zip(THETAS, streams, strict=True) if found.fall <= 0.5), default=THETAS[0])
        judged = _streamed(trained(seed), *_fading(*images()["evaluation"], 300), share)
        chosen.append(share)
        falls.append(judged.fall)
        rows["frame by frame"].append(judged.by_frame)
        rows["changes"].append(judged.changes)
    read = {name: float(np.mean(values)) for name, values in rows.items()}
    ratio = read["frame by frame"] / read["changes"]
    measured = (f"rows of the weights read: frame by frame {100 * read['frame by frame']:.1f} %, changes "
                f"{100 * read['changes']:.1f} %, {ratio:.2f} times fewer; accuracy falls by {mean_and_error(np.array(falls))} "
                f"points; theta {chosen}")
    return Outcome(bool(ratio >= 3 and np.mean(falls) <= 1), measured, {"rows": rows, "falls": falls, "theta": chosen})


class Streamed(NamedTuple):
    """Shares of rows that must be read frame by frame and by changes, and the points of accuracy that changes cost."""

    by_frame: float
    changes: float
    fall: float


def _fading(x: np.ndarray, labels: np.ndarray, count: int) -> tuple[jax.Array, np.ndarray]:
    """`count` images, each fading into the next in `FRAMES` frames, and their labels; every `FRAMES`-th frame is an image."""
    share = np.arange(FRAMES, dtype=np.float32)[:, None] / FRAMES
    frames = [(1 - share) * a + share * b for a, b in zip(x[:count], x[1 : count + 1], strict=True)]
    return jnp.asarray(np.concatenate(frames)), labels[:count]


def _streamed(network: Network, frames: jax.Array, labels: np.ndarray, share: float) -> Streamed:
    by_frame, by_change = frames, frames
    read = np.zeros(2)
    for layer, kernel in network.items():
        theta = share * jnp.std(by_frame)
        streamed = DeltaLinear()(by_change, jnp.asarray(kernel), theta)
        read += kernel.size * np.array([float(jnp.mean(by_frame != 0)), 1 - float(streamed.zeros.mean())])
        by_frame, by_change = by_frame @ jnp.asarray(kernel), streamed.outputs
        if layer != str(len(network) - 1):
            by_frame, by_change = jax.nn.relu(by_frame), jax.nn.relu(by_change)
    right = [float(np.mean(np.asarray(out)[::FRAMES].argmax(1) == labels)) for out in (by_frame, by_change)]
    read /= sum(kernel.size for kernel in network.values())
    return Streamed(float(read[0]), float(read[1]), 100 * (right[0] - right[1]))


AP = "AP, Activate-While-Pruning (2022, arXiv 2212.06145)"
DELTA = "Delta Activation Layer (Yousefzadeh and Sifalakis, 2021, arXiv 2107.07305)"
SIZE = f"ReLU network on digits, {len(SEEDS)} seeds"

CLAIMS = [
    Claim("ap_dead_rate", AP, f"pruning negative weights too wakes units ({SIZE}, 94.5 % pruned)",
          "lower dynamic dead rate with every seed", dead_units, 0.4, fast=True),
    Claim("ap_accuracy", AP, f"the units that it wakes give accuracy ({SIZE}, 94.5 % pruned)", "half a point or more",
          pruned_accuracy, 0.4, fast=True),
    Claim("relative_importance", "Relative-importance pruning (2024, arXiv 2410.16151)",
          f"three quarters of the weights by their share of an output, at once ({SIZE})",
          "accuracy falls by at most 2 points, and by less than with magnitude", by_share, 0.1, fast=True),
    Claim("proact", "ProAct (2024, arXiv 2406.06313)",
          f"bounded activations survive flipped bits ({SIZE}, {FAULTS} draws each, rate {FLIPS:g} in all weights)",
          "10 points above plain, and not below clipping to the bound", flipped_bits, 0.2, fast=True),
    Claim("delta_streams", DELTA, "changes of a slow stream are zero far more often than those of white noise, at one error",
          "twice as many zeros", slow_streams, 0.1, fast=True),
    Claim("delta_digits", DELTA, f"a network on a slow stream reads fewer rows by changes than frame by frame ({SIZE})",
          "3 times fewer, accuracy within a point", fading_digits, 0.4, fast=True),
]
