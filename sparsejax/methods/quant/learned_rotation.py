"""What passes that learn rotations share: R1 and R2 are learned, R4 is a fixed Hadamard transform, all are merged at the end.

A paper is a parametrisation (`compress.orthogonal`), an objective (`compress.rotation_objectives`) and what it is taken of: the
whole model with rounded activations (`Rotated`), or samples of what enters its maps (`samples`). Rounding itself follows
as passes of its own, Gptq or Rtn and QuantizedInputs, as behind QuaRot.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.compress.basis import hadamard_basis
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.calibration import Calibration
from sparsejax.compress.hadamard import check_online
from sparsejax.compress.head_bases import check_heads
from sparsejax.compress.orthogonal import Learned, Loss, Parametrisation, learn
from sparsejax.compress.packed import check_kernels
from sparsejax.compress.recipe import STRUCTURE, Pass, Tier, Work
from sparsejax.compress.rotated import HEADS, STREAM, Rotated, merge_rotations
from sparsejax.compress.scaling import note_equivalence
from sparsejax.compress.surgery import sites_of
from sparsejax.compress.transforms import check_mergeable, fold_norms
from sparsejax.io.model import Model
from sparsejax.methods.pruning.sequential import ALL_MAPS, batches_of
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import check, resolve_chain

Rotations = dict[str, np.ndarray]


class Samples(NamedTuple):
    """What is going to be rounded, float32 with a root mean square of 1 in every row.

    Fields:
      stream: [N, D], rows of what enters attention and FFN of all blocks, shuffled.
      heads: [L, G, N', K], of what enters o, by key-value head.
    """

    stream: np.ndarray
    heads: np.ndarray


@dataclass
class LearnedRotation(Pass):
    """steps: of learning; rate: of its first step; online: maps with an online Hadamard transform, "": none; seed: of the
    random signs of the Hadamard matrix that R1 starts from, and of samples."""

    steps: int = 100
    rate: float = 1.0
    online: str = "blocks.*.mlp.down"
    seed: int = 0
    stage: ClassVar[str] = STRUCTURE
    parametrisation: ClassVar[Parametrisation]

    @abc.abstractmethod
    def solve(self, folded: Model, start: Rotations, work: Work) -> tuple[Rotations, Mapping[str, np.ndarray]]:
        """(the learned `stream` and `heads`, logarithms of scales), see `compress.rotated`.

        Args:
          folded: the model, its norms folded.
          start: where to begin, see `start`.
        """

    def start(self, folded: Model) -> Rotations:
        """A Hadamard matrix with random signs as R1, Hadamard matrices as R2."""
        a = folded.config.attention
        heads = np.broadcast_to(hadamard_basis(a.head_dim), (folded.config.num_layers, a.num_kv_heads, a.head_dim, a.head_dim))
        return {STREAM: hadamard_basis(folded.config.d_model, self.seed), HEADS: heads}

    def check(self, config: ModelConfig) -> None:
        check(self.steps >= 1, "steps", self.steps, "must be at least 1")
        check(0 < self.rate < float("inf"), "rate", self.rate, "must be positive")
        check_mergeable(config)
        check_heads(config)
        self.after(config)

    def after(self, config: ModelConfig) -> ModelConfig:
        return check_online(config, dict.fromkeys(self.online_sites(config), 1))

    def check_inputs(self, model: Model, calibration: Calibration) -> None:
        check_kernels(model, sites_of(model.config, "weights", ALL_MAPS))

    def apply(self, model: Model, work: Work) -> Model:
        folded = fold_norms(model)

        def found() -> dict[str, np.ndarray]:
            rotations, free = self.solve(folded, self.start(folded), work)
            return {**rotations, **{f"scale {name}": value for name, value in free.items()}}

        kept = work.piece("learned", found)
        free = {name.removeprefix("scale "): value for name, value in kept.items() if name.startswith("scale ")}
        rotations = {name: kept[name] for name in (STREAM, HEADS)}
        merged = merge_rotations(model, rotations, free, self.online_sites(model.config))
        note_equivalence(work, self.name, model, merged)
        return merged

    def online_sites(self, config: ModelConfig) -> list[str]:
        """Sites of R4."""
        return sites_of(config, "inputs", self.online, "online") if self.online else []

    def learned(self, work: Work, title: str, loss: Loss, start: Rotations, batches: Any, **more: Any) -> Learned:
        """`orthogonal.learn` with this pass's options; the objective before and after is noted under `title`."""
        with work.progress(f"{self.name}: {title}", self.steps) as advance:
            found = learn(loss, start, batches, self.parametrisation, rate=self.rate, steps=self.steps, advance=advance, **more)
        work.note(self.name, **{f"objective_{title}": {"before": found.before, "after": found.after, "path": found.path}})
        return found


@dataclass
class ModelRotation(LearnedRotation):
    """One that learns from the whole model: activations: the op that rounds what enters the maps of blocks."""

    activations: str = "int4"

    def check(self, config: ModelConfig) -> None:
        resolve_chain("activation_op", self.activations, "activations")
        super().check(config)

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{self.steps} gradients of the whole model, {tier.length} tokens each, and all weights turned for each"

    def rounded(self, folded: Model, weights: str = "") -> Rotated:
        """The model whose maps read rounded inputs, and have rounded kernels where `weights` names an op."""
        sites = sites_of(folded.config, "inputs", ALL_MAPS)
        ops = dict.fromkeys(sites, self.activations)
        return Rotated(folded, self.online_sites(folded.config), ops, dict.fromkeys(sites, weights) if weights else {})


@dataclass
class SampleRotation(LearnedRotation):
    """One that learns from samples, R1 from those of all blocks together and R2 from those of its head.

    rows: of R1's samples, and of R2's in all layers, for each head; batch: rows of a step.
    """

    rows: int = 32_768
    batch: int = 4_096

    @abc.abstractmethod
    def objective(self, y: Any) -> Any:
        """Of rotated samples [N, n]."""

    def check(self, config: ModelConfig) -> None:
        for name in ("rows", "batch"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        super().check(config)

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        return f"{config.num_layers} blocks x {tier.sequences * tier.length:,} tokens, and {2 * self.steps} steps of learning"

    def solve(self, folded: Model, start: Rotations, work: Work) -> tuple[Rotations, Mapping[str, np.ndarray]]:
        taken = samples(folded, work, self.rows, self.seed)
        work.note(self.name, sampled_rows={STREAM: len(taken.stream), HEADS: taken.heads.shape[2]})

        def of_stream(rotations: Any, free: Any, x: Any) -> Any:
            return self.objective(x @ rotations[STREAM])

        def of_heads(rotations: Any, free: Any, x: Any) -> Any:
            y = jnp.einsum("lgnk,lgkj->lgnj", x, rotations[HEADS])
            return jnp.mean(jax.vmap(self.objective)(y.reshape(-1, *y.shape[2:])))

        found: Rotations = {}
        for name, loss, rows, axis in ((STREAM, of_stream, taken.stream, 0), (HEADS, of_heads, taken.heads, 2)):
            count = max(1, rows.shape[axis] // self.batch)
            cut = count * (rows.shape[axis] // count)  # batches of one shape are compiled once
            batches = np.split(np.take(rows, np.arange(cut), axis), count, axis)
            found |= self.learned(work, name, loss, {name: start[name]}, batches).rotations
        return found, {}


def samples(folded: Model, work: Work, rows: int, seed: int) -> Samples:
    """Random rows of what enters the maps of every block, without the first token of each sequence, which is an outlier.

    Args:
      rows: of the stream in all blocks, and of each head in all layers.
    """
    blocks, rng, a = Blocks(folded), np.random.default_rng(seed), folded.config.attention
    skip = max(1, work.calibration.spec.skip_first)
    quota = -(-rows // (2 * len(blocks)))
    streams = [blocks.embed(tokens) for tokens in batches_of(work.calibration)]
    stream, heads = [], []
    for layer in work.layers("samples", len(blocks)):
        entering: dict[str, list[np.ndarray]] = {"attn.q": [], "mlp.up": [], "attn.o": []}
        for number, h in enumerate(streams):
            streams[number], tensors = blocks.tensors(layer, h, *entering)
            for name, x in tensors.items():
                entering[name].append(np.asarray(x, np.float32)[:, skip:].reshape(-1, x.shape[-1]))
        for name in ("attn.q", "mlp.up"):
            stream.append(_drawn(np.concatenate(entering[name]), quota, rng))
        by_head = np.concatenate(entering["attn.o"]).reshape(-1, a.num_kv_heads, a.num_heads // a.num_kv_heads, a.head_dim)
        read = by_head.transpose(1, 0, 2, 3).reshape(a.num_kv_heads, -1, a.head_dim)
        heads.append(_drawn(read, 2 * quota, rng, axis=1))
    return Samples(_unit(rng.permutation(np.concatenate(stream))), _unit(np.stack(heads)))


def _drawn(x: np.ndarray, count: int, rng: np.random.Generator, axis: int = 0) -> np.ndarray:
    return np.take(x, rng.permutation(x.shape[axis])[:count], axis)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.sqrt(np.mean(x**2, -1, keepdims=True)), 1e-12)
