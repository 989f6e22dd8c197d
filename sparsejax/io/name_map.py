"""Published names and layouts of weights beside ours, as data that is read in both directions.

A family lists `Entry` templates; `expand` writes them out for a config. Loading and exporting walk the same entries, so that
export is the inverse of import by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import Transformer

Arrays = Sequence[np.ndarray]


class Layout(Protocol):
    """How the tensors of an entry are laid out on the two sides; `save` undoes `load`. Views are returned where possible."""

    def load(self, theirs: Arrays) -> list[np.ndarray]: ...

    def save(self, ours: Arrays) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Same:
    """One tensor, stored alike."""

    def load(self, theirs: Arrays) -> list[np.ndarray]:
        return list(theirs)

    def save(self, ours: Arrays) -> list[np.ndarray]:
        return list(ours)


@dataclass(frozen=True)
class Transposed:
    """torch's Linear: theirs [out, in], ours [in, out]; any leading axes stay."""

    def load(self, theirs: Arrays) -> list[np.ndarray]:
        return [np.swapaxes(array, -1, -2) for array in theirs]

    save = load


@dataclass(frozen=True)
class Reshaped:
    """The same numbers in the same order under another shape, e.g. a convolution's kernel or a class token [1, 1, D]."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def load(self, theirs: Arrays) -> list[np.ndarray]:
        return [array.reshape(self.ours) for array in theirs]

    def save(self, ours: Arrays) -> list[np.ndarray]:
        return [array.reshape(self.theirs) for array in ours]


@dataclass(frozen=True)
class Patches:
    """The kernel of a convolution over patches: theirs [D, C, P, P], ours [P * P * C, D], a patch row by row, channels last."""

    size: int
    channels: int

    def load(self, theirs: Arrays) -> list[np.ndarray]:
        return [array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0]) for array in theirs]

    def save(self, ours: Arrays) -> list[np.ndarray]:
        return [array.reshape(self.size, self.size, self.channels, -1).transpose(3, 2, 0, 1) for array in ours]


@dataclass(frozen=True)
class Stacked:
    """One tensor per expert on their side, one with a leading expert axis on ours."""

    each: Layout = Same()

    def load(self, theirs: Arrays) -> list[np.ndarray]:
        return [np.stack([self.each.load([array])[0] for array in theirs])]

    def save(self, ours: Arrays) -> list[np.ndarray]:
        return [self.each.save([array])[0] for array in ours[0]]


@dataclass(frozen=True)
class Fused:
    """One tensor on their side that holds several of ours one after another along `axis` of our layout.

    `sizes` are those of ours along `axis`; `each` is the layout of the fused tensor as a whole.
    """

    sizes: tuple[int, ...]
    axis: int = -1
    each: Layout = Same()

    def load(self, theirs: Arrays) -> list[np.ndarray]:
        return np.split(self.each.load(theirs)[0], np.cumsum(self.sizes)[:-1], axis=self.axis)

    def save(self, ours: Arrays) -> list[np.ndarray]:
        return self.each.save([np.concatenate(list(ours), axis=self.axis)])


@dataclass(frozen=True)
class Interleaved:
    """One tensor on their side whose last axis, in our layout, holds for each of `groups` a piece of every one of ours in turn.

    As in GPT-NeoX's query_key_value: head by head its q, k and v. `each` is the layout of the fused tensor as a whole.
    """

    groups: int
    parts: int
    each: Layout = Same()

    def load(self, theirs: Arrays) -> list[np.ndarray]:
        whole = self.each.load(theirs)[0]
        pieces = whole.reshape(*whole.shape[:-1], self.groups, self.parts, -1)
        return [pieces[..., part, :].reshape(*whole.shape[:-1], -1) for part in range(self.parts)]

    def save(self, ours: Arrays) -> list[np.ndarray]:
        pieces = [array.reshape(*array.shape[:-1], self.groups, -1) for array in ours]
        return self.each.save([np.stack(pieces, axis=-2).reshape(*ours[0].shape[:-1], -1)])


@dataclass(frozen=True)
class Entry:
    """Tensors of ours and the tensors of theirs that hold the same numbers.

    Fields:
      ours: our parameter names, `SITE.LEAF` as in `blocks.{layer}.attn.q.kernel`.
      theirs: their names; `{layer}` and `{expert}` stand for all layers and all experts. A single name with `{expert}` expands
        to one tensor per expert.
      layout: how the two sides are laid out.
      optional: theirs may be absent, ours then keeps `default`; e.g. a bias that some checkpoints leave out.
      default: what an absent tensor of an optional entry is filled with.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout = Same()
    optional: bool = False
    default: float = 0.0


def entry(ours: str | tuple[str, ...], theirs: str | tuple[str, ...], layout: Layout = Same(), **options) -> Entry:
    """An Entry; a single name may be given as a string."""
    return Entry(_names(ours), _names(theirs), layout, **options)


def _names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def linear(ours: str, theirs: str) -> tuple[Entry, Entry]:
    """A torch Linear: `.weight` transposed into `.kernel`, and `.bias` where our map has one."""
    return entry(f"{ours}.kernel", f"{theirs}.weight", Transposed()), entry(f"{ours}.bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    """A torch norm: `.weight` is our gain, `.bias` where our norm has one."""
    return entry(f"{ours}.gain", f"{theirs}.weight"), entry(f"{ours}.bias", f"{theirs}.bias")


def expand(templates: Sequence[Entry], config: ModelConfig, existing: set[str], experts: int = 0) -> list[Entry]:
    """The entries of a model, with layers and experts written out; those whose tensors the model does not have are left out.

    Args:
      templates: a family's entries.
      config: of the model.
      existing: names of the model's parameters (`parameter_slots`).
      experts: number of experts, for names with `{expert}`.
    Raises:
      ValueError: a parameter of the model that no entry, or more than one, provides: the family's map is wrong.
    """
    found: list[Entry] = []
    for template in templates:
        encoder = any(name.startswith("encoder.") for name in template.ours)
        count = config.encoder_layers if encoder else config.num_layers
        layered = any("{layer}" in name for name in template.ours)
        for layer in range(count) if layered else (0,):
            ours = tuple(name.format(layer=layer) for name in template.ours)
            if existing.isdisjoint(ours):
                continue
            theirs = tuple(written for name in template.theirs for written in _write_out(name, layer, experts))
            found.append(Entry(ours, theirs, template.layout, template.optional, template.default))
    provided = [name for one in found for name in one.ours]
    wrong = sorted(existing.symmetric_difference(provided)) or sorted({n for n in provided if provided.count(n) > 1})
    if wrong:
        raise ValueError(f"the family's name map does not cover this model exactly: {', '.join(wrong[:8])}")
    return found


def _write_out(name: str, layer: int, experts: int) -> list[str]:
    if "{expert}" not in name:
        return [name.format(layer=layer)]
    return [name.format(layer=layer, expert=expert) for expert in range(experts)]


class Slot(NamedTuple):
    """Where a parameter lies: the path of its array in the values, and its row there (None: the array is not stacked)."""

    path: tuple[str, ...]
    row: int | None


def parameter_slots(model: Transformer, paths: Sequence[tuple[str, ...]]) -> dict[str, Slot]:
    """Every parameter's name (`SITE.LEAF`, layers written out) with where it lies.

    Args:
      model: abstract or real; read for how its stacks are cut into segments.
      paths: of its leaves, `Structure.paths`.
    """
    slots: dict[str, Slot] = {}
    for path in paths:
        if len(path) < 4 or path[1] != "segments":
            slots[".".join(path)] = Slot(path, None)
            continue
        stack, _, segment, slot, *rest = path
        prefix = stack
        if model.encoder is not None:
            prefix = {"encoder": "encoder.blocks", "blocks": "decoder.blocks"}[stack]
        plan = getattr(model, stack).plan
        start = sum(period * repeats for period, repeats in plan[: int(segment)])
        period, repeats = plan[int(segment)]
        for row in range(repeats):
            layer = start + row * period + int(slot)
            slots[".".join((prefix, str(layer), *rest))] = Slot(path, row)
    return slots
