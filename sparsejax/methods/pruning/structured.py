"""Activation-based structured pruning: the units that answer least are cut out (Zhao et al., 2022, arXiv 2201.10520).

Acts on the hidden units of every FFN and on the key-value heads of every attention with the query heads that read them:

    importance_f = mean over tokens of |h_f|^p        h[.., F] enters `down`; published for filters of CNNs, p = 1..4
    importance_g = mean over tokens of ||out_g||_2    out_g: what the query heads of group g give, concatenated

The least important units of each layer are removed from the kernels: `ffn.hidden` and the head counts shrink, the same in every
layer. Removing a unit is the same as masking what it gives.
`until` is the paper's adaptive policy for neurons instead of a fixed share: `loss:X` raises the share while the loss on the
calibration tokens stays within X nats of what it was (accuracy-critical), halving the step where it does not, until the step is
below 1/80; `parameters:X` cuts until the model has at most that share of its parameters (memory-constrained).
Not here: fine-tuning with rewound weights between steps (`experiments.train` from the sliced folder), the target on flops.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsejax import nnx_compat
from sparsejax.compress.blocks import Blocks
from sparsejax.compress.recipe import STRUCTURE, Pass, Tier, Work, check_sparsity
from sparsejax.context import Context, Probe, Stat
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.io.model import Model
from sparsejax.io.name_map import parameter_slots
from sparsejax.methods.pruning.sequential import batches_of
from sparsejax.methods.pruning.slicing import check_sliceable, with_head_groups, with_neurons
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import parameter_counts
from sparsejax.plugs import ConfigError, check, check_choice

# The adaptive policy's first step of the share, and where it stops.
FIRST_STEP, LEAST_STEP = 0.1, 1 / 80


@dataclass(frozen=True)
class _Answers:
    """A probe's measurement: sums over tokens of |x|^power, or of the norm of each of `groups` equal parts."""

    power: float
    groups: int
    skip: int

    def __call__(self, tensor: Array, ctx: Context) -> dict[str, Stat]:
        rows = tensor[:, self.skip :].reshape(-1, tensor.shape[-1]).astype(jnp.float32)
        if self.groups:
            answers = jnp.linalg.norm(rows.reshape(len(rows), self.groups, -1), axis=-1)
        else:
            answers = jnp.abs(rows) ** self.power
        return {"sum": Stat(jnp.sum(answers, axis=0))}


def raise_share(acceptable: Callable[[float], bool], step: float = FIRST_STEP, least: float = LEAST_STEP) -> float:
    """The paper's policy: raise the share by `step`; where the result is not acceptable go back and halve the step."""
    share = 0.0
    while step >= least:
        if share + step < 1 and acceptable(share + step):
            share += step
        else:
            step /= 2
    return share


def share_within(config: ModelConfig, allowed: float) -> float:
    """The least share of FFN neurons to remove so that at most `allowed` of the parameters are left.

    Raises:
      ConfigError: the model is larger than that without any neuron but one per layer.
    """

    def parameters(hidden: int) -> int:
        return parameter_counts(dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, hidden=hidden)))["total"]

    total, least = parameters(config.ffn.hidden), parameters(1)
    each = parameters(2) - least
    hidden = 1 + int((allowed * total - least) // each)
    if hidden < 1:
        raise ConfigError(f"until = 'parameters:{allowed}': with one neuron per layer {least / total:.3f} of them are left")
    return 1 - min(hidden, config.ffn.hidden) / config.ffn.hidden


@dataclass
class Structured(Pass):
    """neurons, heads: shares that go; power: p; importance: activation | random; seed: of random; until: see above."""

    neurons: float = 0.3
    heads: float = 0.0
    power: float = 2.0
    importance: str = "activation"
    seed: int = 0
    until: str = ""
    stage: ClassVar[str] = STRUCTURE

    def check(self, config: ModelConfig) -> None:
        check_sparsity(self.neurons, "neurons")
        check_sparsity(self.heads, "heads")
        check_choice("importance", self.importance, ("activation", "random"))
        check(self.power > 0, "power", self.power, "must be positive")
        check_sliceable(config, neurons=self.neurons > 0 or bool(self.until), heads=self.heads > 0)
        if self.until:
            kind, limit = self._target()
            if kind == "parameters":
                share_within(config, limit)
        groups = config.attention.num_kv_heads
        check(round(self.heads * groups) < groups, "heads", self.heads, f"leaves none of {groups} key-value heads")

    def _target(self) -> tuple[str, float]:
        kind, _, text = self.until.partition(":")
        check_choice("until", kind, ("loss", "parameters"))
        try:
            limit = float(text)
        except ValueError as error:
            raise ConfigError(f"until = {self.until!r}: expected 'loss:NATS' or 'parameters:SHARE'") from error
        check(limit > 0 and (kind == "loss" or limit <= 1), "until", self.until, "must be positive, and a share at most 1")
        return kind, limit

    def cost(self, config: ModelConfig, tier: Tier) -> str:
        passes = "a pass" if not self.until.startswith("loss") else "up to 14 passes"
        return f"{passes} of {tier.sequences * tier.length:,} tokens"

    def apply(self, model: Model, work: Work) -> Model:
        neurons, groups = self._importance(model, work)
        share = self._share(model, work, neurons)
        before = parameter_counts(model.config)["total"]
        if round(share * neurons.shape[1]):
            model = with_neurons(model, _kept(neurons, share))
        if round(self.heads * groups.shape[1]):
            model = with_head_groups(model, _kept(groups, self.heads))
        after = parameter_counts(model.config)["total"]
        work.note(self.name, share_of_neurons=share, hidden=model.config.ffn.hidden,
                  num_kv_heads=model.config.attention.num_kv_heads, parameters_before=before, parameters_after=after)
        return model

    def _importance(self, model: Model, work: Work) -> tuple[Float[np.ndarray, "L F"], Float[np.ndarray, "L G"]]:
        config = model.config
        if self.importance == "random":
            rng = np.random.default_rng(self.seed)
            layers = config.num_layers
            return rng.random((layers, config.ffn.hidden)), rng.random((layers, config.attention.num_kv_heads))
        skip = work.calibration.spec.skip_first
        probes = (
            Probe("mlp.down", _Answers(self.power, 0, skip)),
            Probe("attn.o", _Answers(1, config.attention.num_kv_heads, skip)),
        )
        blocks = Blocks(model)
        streams = zip(*(blocks.stream(tokens) for tokens in batches_of(work.calibration)), strict=True)
        found = []
        for layer in work.layers(self.name, len(blocks)):
            entering = [h for _, h in next(streams)]
            found.append(work.piece(f"block{layer}", functools.partial(_answers, blocks, layer, entering, probes)))
        return np.stack([one["neurons"] for one in found]), np.stack([one["heads"] for one in found])

    def _share(self, model: Model, work: Work, importance: np.ndarray) -> float:
        """Of neurons that go."""
        if not self.until:
            return self.neurons
        kind, limit = self._target()
        return share_within(model.config, limit) if kind == "parameters" else self._within_loss(model, work, importance, limit)

    def _within_loss(self, model: Model, work: Work, importance: np.ndarray, limit: float) -> float:
        """The largest share whose loss on the calibration tokens is at most `limit` nats above the model's."""
        scorer = Scorer(model)
        rows = [Row(tokens, 1) for tokens in work.calibration.tokens]

        def loss(share: float) -> float:
            scorer.model = _masked(model, _kept(importance, share)) if share else model
            return float(np.mean(scorer.score(rows).nll) / (work.calibration.tokens.shape[1] - 1))

        dense = loss(0)
        return raise_share(lambda share: loss(share) <= dense + limit)


def _answers(blocks: Blocks, layer: int, entering: Sequence[Array], probes: tuple[Probe, ...]) -> dict[str, np.ndarray]:
    stats = [blocks.run(layer, h, probes=probes)[1] for h in entering]
    sums = {probe.site: sum(np.asarray(one[probe.site]["sum"].value, np.float64) for one in stats) for probe in probes}
    return {"neurons": np.asarray(sums["mlp.down"]), "heads": np.asarray(sums["attn.o"])}


def _kept(importance: Float[np.ndarray, "L N"], share: float) -> list[np.ndarray]:
    """Increasing indices of the most important units of each layer; of equal ones the first stay."""
    count = importance.shape[1] - round(share * importance.shape[1])
    return [np.sort(np.argsort(-row, kind="stable")[: max(1, count)]) for row in importance]


def _masked(model: Model, kept: list[np.ndarray]) -> Model:
    """The model without the other neurons, at its old width (rows of `down` are zero), so that no program is compiled anew."""
    values = jax.tree.map(lambda a: a, model.values)  # new dicts, the same arrays
    masks: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
    slots = parameter_slots(model.module(), model.structure.paths)
    for layer, index in enumerate(kept):
        slot = slots[f"blocks.{layer}.mlp.down.kernel"]
        masks.setdefault(slot.path, {})[slot.row or 0] = np.isin(np.arange(model.config.ffn.hidden), index)
    for path, rows in masks.items():
        mask = jnp.asarray(np.stack([rows[row] for row in sorted(rows)]))[..., None]
        nnx_compat.put(values, path, jnp.where(mask, nnx_compat.at(values, path), 0))
    return dataclasses.replace(model, values=values)
