"""The site map of a decoder: who writes and who reads each stretch of its residual stream, as data.

A stretch is the stream between two additions. A linear change of basis of a stretch can be merged into the maps around it:
writers take it at their output, readers its inverse at their input, and the skip path into the next stretch is the change from
one basis to the other. A norm in front of the readers commutes with a rotation once its gain is one.

Families differ in where a block adds and normalises, which is `ModelConfig.block`; what a map lists and a model lacks (a gate,
experts, a bias) is left out. A parameter that touches the stream and is not on the map is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sparsejax import nnx_compat
from sparsejax.io.name_map import parameter_slots
from sparsejax.models.config import ModelConfig
from sparsejax.models.transformer import abstract_transformer
from sparsejax.plugs import ConfigError, check

STREAM_AXIS = "embed"  # the logical axis of parameters along the residual stream


class Read(NamedTuple):
    """Linear maps (sites) that read a stretch through one norm."""

    norm: str
    linears: tuple[str, ...]


class Writer(NamedTuple):
    """A linear map or a table whose output is added, after a learned scale per channel where the model has one."""

    site: str
    scale: str = ""


class Part(NamedTuple):
    """What happens between two additions: what is read, what is added at the end, and the skip path around it."""

    name: str
    reads: tuple[Read, ...]
    writers: tuple[Writer, ...]
    skip: str


class Stretch(NamedTuple):
    """The residual stream between two additions; sites have their layers written out.

    Fields:
      name: `blocks.3.attn` and `blocks.3.mlp` (what these read), `blocks.3` of a parallel block, `head`.
      writers: whose outputs are added where it begins.
      reads: who reads it.
      skip: site of the path into the next stretch, a `residuals` site; empty for the last.
    """

    name: str
    writers: tuple[Writer, ...]
    reads: tuple[Read, ...]
    skip: str


_ATTENTION = Read("attn_norm", ("attn.q", "attn.k", "attn.v"))
_FEED = Read(
    "mlp_norm",
    ("mlp.gate", "mlp.up", "mlp.router", "mlp.shared_gate", "mlp.experts.gate", "mlp.experts.up", "mlp.shared.gate",
     "mlp.shared.up"),
)  # fmt: skip
_MIXED = (Writer("attn.o", "attn_scale"),)
_FED = tuple(Writer(site, "mlp_scale") for site in ("mlp.down", "mlp.experts.down", "mlp.shared.down"))

# By `ModelConfig.block`: the parts of one block.
BLOCKS: dict[str, tuple[Part, ...]] = {
    "pre": (
        Part("attn", (_ATTENTION,), _MIXED, "residual.attn"),
        Part("mlp", (_FEED,), _FED, "residual.mlp"),
    ),
    "parallel": (Part("", (_ATTENTION, _FEED), (*_MIXED, *_FED), "residual.attn"),),
}
ENTRY = (Writer("embed.table"), Writer("embed.positions"))
EXIT = Read("norm", ("head",))

# (field, values that will do, why others will not)
_REQUIRED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("kind", ("decoder",), "its residual stream has no site map; expected a decoder"),
    ("block", tuple(BLOCKS), "the norm behind an addition (post) or behind a map (sandwich) has a gain that no linear map "
     "takes up, so no basis of the residual stream can be merged; expected pre or parallel"),
    ("embedding_norm", (False,), "the norm of the embeddings has a gain that no linear map takes up"),
    ("head", (True,), "the model ends with its hidden states, which would come out in another basis"),
    ("head_transform", (False,), "its readers of the last hidden state are not on the site map"),
)  # fmt: skip


def residual_stream(config: ModelConfig) -> list[Stretch]:
    """The stretches of a finalized config's residual stream, from the embedding to the head.

    Raises:
      ConfigError: an arrangement in which no basis can be merged, or a parameter at the stream that the map does not list.
    """
    for field, allowed, why in _REQUIRED:
        check(getattr(config, field) in allowed, f"model.{field}", getattr(config, field), why)
    check(config.positions.kind != "sinusoidal", "model.positions.kind", config.positions.kind,
          "these positions are added to the residual stream and are no parameter that could be changed")
    axes = parameter_axes(config)
    owners = {name.rpartition(".")[0] for name in axes} | {"head"} | set(axes)
    stretches: list[Stretch] = []
    writers: tuple[Writer, ...] = ENTRY
    for layer in range(config.num_layers):
        for part in BLOCKS[config.block]:
            here = f"blocks.{layer}"
            reads = tuple(Read(f"{here}.{r.norm}", tuple(f"{here}.{s}" for s in r.linears)) for r in part.reads)
            name = f"{here}.{part.name}" if part.name else here
            stretches.append(_existing(Stretch(name, writers, reads, f"{here}.{part.skip}"), owners))
            writers = tuple(Writer(f"{here}.{w.site}", f"{here}.{w.scale}") for w in part.writers)
    stretches.append(_existing(Stretch("head", writers, (EXIT,), ""), owners))
    _check_complete(stretches, axes)
    return stretches


def parameter_axes(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every parameter by name, layers written out; nothing is allocated."""
    structure, shapes = abstract_transformer(config)
    slots = parameter_slots(nnx_compat.merge(structure, shapes), structure.paths)
    axes = dict(zip(structure.paths, (variable.axes for variable in structure.variables), strict=True))
    return {name: axes[slot.path] for name, slot in slots.items()}


def _existing(stretch: Stretch, owners: set[str]) -> Stretch:
    writers = tuple(Writer(w.site, w.scale if w.scale in owners else "") for w in stretch.writers if w.site in owners)
    reads = tuple(Read(r.norm, tuple(s for s in r.linears if s in owners)) for r in stretch.reads)
    return stretch._replace(writers=writers, reads=reads)


def _check_complete(stretches: list[Stretch], axes: dict[str, tuple[str | None, ...]]) -> None:
    listed: set[str] = set()
    for stretch in stretches:
        listed |= {site for writer in stretch.writers for site in writer if site}
        listed |= {site for read in stretch.reads for site in (read.norm, *read.linears)}
    owned = {name for site in listed for name in (site, *(f"{site}.{leaf}" for leaf in ("kernel", "bias", "gain")))}
    unknown = sorted(name for name, named in axes.items() if STREAM_AXIS in named and name not in owned)
    if unknown:
        raise ConfigError(f"{', '.join(unknown[:4])}: reads or writes the residual stream and is not on the site map, so that "
                          "no change of basis can be merged into it")
