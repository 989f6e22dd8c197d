"""How large a model is and what a token of it costs, from its config alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from sparsejax import plugs
from sparsejax.layers.linear import Linear
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import ModelConfig


class FFNSize(NamedTuple):
    """Parameters of one feed-forward network and its training flops per token (forward and backward)."""

    parameters: int
    flops: int


def ffn_size(d_model: int, hidden: int, *, gated: bool, bias: bool = False) -> FFNSize:
    """Size of a dense feed-forward network.

    Args:
      d_model: width D of the residual stream.
      hidden: width F of the hidden vector.
      gated: three maps (up, gate, down) instead of two.
      bias: each map has one.
    """
    entering = 2 if gated else 1
    matrices = (entering + 1) * d_model * hidden
    return FFNSize(matrices + (entering * hidden + d_model if bias else 0), 6 * matrices)


def ffn_width(d_model: int, *, gated: bool, match: str = "parameters", bias: bool = False, multiple: int = 8) -> int:
    """The hidden width F at which a feed-forward network equals the plain one of width 4 D: 2/3 of that when gated, since three
    maps share what two had. The two rules differ by what the biases weigh.

    Args:
      match: `"parameters"` or `"flops"`: what is held equal, see `FFNSize`.
      multiple: F is rounded to the nearest multiple of this.
    Raises:
      ConfigError: another `match`.
    """
    plugs.check_choice("match", match, FFNSize._fields)
    target = getattr(ffn_size(d_model, 4 * d_model, gated=False, bias=bias), match)
    fixed, once = (getattr(ffn_size(d_model, hidden, gated=gated, bias=bias), match) for hidden in (0, 1))
    return max(multiple, round((target - fixed) / (once - fixed) / multiple) * multiple)


def ffn_comparison(config: ModelConfig) -> str:
    """One line: width, parameters and flops per token of a layer's dense FFN, beside the plain one of width 4 D."""
    own = ffn_size(config.d_model, config.ffn.hidden, gated=is_gated(config), bias=config.ffn.bias)
    plain = ffn_size(config.d_model, 4 * config.d_model, gated=False, bias=config.ffn.bias)
    return (
        f"ffn {'gated' if is_gated(config) else 'plain'} F={config.ffn.hidden}: {own.parameters:,} parameters, "
        f"{own.flops:,} flops per token ({own.parameters / plain.parameters:.3f} and {own.flops / plain.flops:.3f} "
        f"of plain F={4 * config.d_model})"
    )


def is_gated(config: ModelConfig) -> bool:
    """Whether two hidden vectors enter the non-linearity: from a gate map, or from the halves of a doubled up map."""
    spec = plugs.resolve("nonlinearity", config.ffn.activation, "model.ffn.activation")
    return bool(spec.gated or spec.halves)


def has_head(config: ModelConfig) -> bool:
    """Whether the output head is a linear map of its own; also where the number of its outputs is not known yet."""
    return config.head and (config.kind == "vit" or config.num_classes > 0 or not config.tied_embeddings)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """`{site: (in, out)}` of every linear map in the blocks, for the rules of `inputs` and `weights`; experts share a site."""
    shapes: dict[str, tuple[int, int]] = {}
    feeds = _feeds(config)
    for stack, layers, crossed in _stacks(config):
        for layer in range(layers):
            for part in ("attn", "cross") if crossed else ("attn",):
                shapes.update(_attention_shapes(config, f"{stack}.{layer}.{part}"))
            feed = feeds[layer % len(feeds)]
            shapes.update({f"{stack}.{layer}.{site}": shape for site, shape in feed.sites.items()})
    if config.head_transform:
        shapes["head_transform.project"] = (config.d_model, config.d_model)
    if has_head(config):
        shapes["head"] = (config.d_model, config.num_classes or config.vocab_size)
    return shapes


def expert_sites(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """`{site: (experts that a token passes, experts)}` of the maps of experts in a decoder's blocks."""
    feeds = _feeds(config)
    layers = ((layer, feeds[layer % len(feeds)]) for layer in range(config.num_layers))
    return {f"blocks.{layer}.{site}": counts for layer, feed in layers for site, counts in feed.experts.items()}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters of a finalized model by part: embedding, attention, cross, feed, norm, head, and their total."""
    counts = dict.fromkeys(("embedding", "attention", "cross", "feed", "norm", "head"), 0)
    counts["embedding"], counts["head"] = _embedding_count(config), _head_count(config)
    feeds = _feeds(config)
    for _, layers, crossed in _stacks(config):
        attention = _attention_count(config)
        counts["attention"] += layers * attention
        counts["cross"] += layers * attention * crossed
        counts["feed"] += sum(feeds[layer % len(feeds)].parameters for layer in range(layers))
        counts["norm"] += (layers * _block_norms(config, crossed) + (config.block != "post")) * _norm_count(config)
        counts["norm"] += layers * 2 * config.d_model * (config.layer_scale > 0)
    counts["norm"] += (config.embedding_norm + config.head_transform) * _norm_count(config)
    counts["total"] = sum(counts.values())
    return counts


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations of one training step per token, forward and backward.

        6 * N + 12 * sum_layers(H * K * S)

    N counts the matmul parameters that a token passes: kernels of the blocks (of the active experts only) and the output head,
    also where it is tied; not the embedding's gather, norms or biases. S is the mean number of keys that a query needs:
    (T + 1) / 2 when causal, less in a sliding window, T when bidirectional, so work spent on masked pairs counts as waste.
    An encoder-decoder counts both sides at the same length, per decoder token; recomputation (remat) is not counted.

    Args:
      config: finalized.
      length: tokens T of a sequence (patches and class token of an image).
    """
    a, feeds = config.attention, _feeds(config)
    active, keys = 0.0, 0.0
    for stack, layers, crossed in _stacks(config):
        causal = config.kind == "decoder" or stack.startswith("decoder")
        attention = sum(i * o for i, o in _attention_shapes(config, stack).values())
        active += layers * attention * (1 + crossed) + sum(feeds[layer % len(feeds)].active for layer in range(layers))
        for layer in range(layers):
            local = config.attention_pattern[layer % len(config.attention_pattern)] == "local"
            keys += _mean_keys(length, causal, a.window if local else 0) + length * crossed
    outputs = config.num_classes / length if config.num_classes else config.vocab_size  # a classifier pools first
    heads = config.d_model * (outputs * config.head + config.d_model * config.head_transform)
    return 6 * (active + heads) + 12 * a.num_heads * a.head_dim * keys


def _stacks(config: ModelConfig) -> list[tuple[str, int, bool]]:
    """(site prefix, layers, cross-attention) of each stack of blocks."""
    if config.kind != "encoder_decoder":
        return [("blocks", config.num_layers, False)]
    return [("encoder.blocks", config.encoder_layers, False), ("decoder.blocks", config.num_layers, True)]


def _attention_shapes(config: ModelConfig, site: str) -> dict[str, tuple[int, int]]:
    a, width = config.attention, config.d_model
    queries, keys = (heads * a.head_dim for heads in (a.num_heads, a.num_kv_heads))
    shapes = {"q": (width, queries), "k": (width, keys), "v": (width, keys), "o": (queries, width)}
    return {f"{site}.{name}": shape for name, shape in shapes.items()}


def _attention_count(config: ModelConfig) -> int:
    a = config.attention
    shapes = _attention_shapes(config, "")
    biases = a.bias * sum(shapes[s][1] for s in (".q", ".k", ".v")) + a.out_bias * config.d_model
    normed = 2 * a.head_dim if a.qk_norm_over == "head" else shapes[".q"][1] + shapes[".k"][1]
    return sum(i * o for i, o in shapes.values()) + biases + normed * a.qk_norm


class _Feed(NamedTuple):
    """The linear maps of one entry of `feed_pattern` by site, those of experts among them with (experts that a token passes,
    experts), its parameters, and the matmul parameters that a token passes."""

    sites: dict[str, tuple[int, int]]
    experts: dict[str, tuple[int, int]]
    parameters: int
    active: float


def _feeds(config: ModelConfig) -> list[_Feed]:
    return [_feed(config, feed) for feed in config.feed_pattern]


class _SiteNames(SiteRules):
    """Rules that give every linear map its own site as its only op, so that the sites of a module can be read off."""

    def at(self, field: str, site: str) -> tuple[str, ...]:
        return (site,) if field == "inputs" else ()


def _feed(config: ModelConfig, feed: str) -> _Feed:
    """Read off the module itself, so that a new kind of feed needs no formula here."""
    spec = plugs.resolve("feed", feed, "model.feed_pattern")
    module = jax.eval_shape(lambda: spec.build(config, key=jax.random.key(0), site="mlp", rules=_SiteNames()))
    linears = [leaf for leaf in jax.tree.leaves(module, is_leaf=lambda v: isinstance(v, Linear)) if isinstance(leaf, Linear)]
    shapes = [linear.kernel.get_value().shape for linear in linears]
    named = list(zip(linears, shapes, strict=True))
    routers = sum(math.prod(shape) for linear, shape in named if linear.kernel.role == "router")
    matrices = sum(math.prod(shape) for _, shape in named) - routers
    share = spec.active_fraction() if hasattr(spec, "active_fraction") else 1.0
    return _Feed(
        sites={op.spec: shape[-2:] for linear, shape in named for op in linear.inputs.values()},
        experts={op.spec: (spec.k, shape[0]) for linear, shape in named for op in linear.inputs.values() if len(shape) == 3},
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(module)),
        active=matrices * share + routers,
    )


def _block_norms(config: ModelConfig, crossed: bool) -> int:
    return (4 if config.block == "sandwich" else 2) + crossed


def _norm_count(config: ModelConfig) -> int:
    return config.d_model * {"rms": 1, "layer": 1 + config.norm.bias, "none": 0}[config.norm.kind]


def _mean_keys(length: int, causal: bool, window: int) -> float:
    """Keys that a query needs, averaged over the queries of a sequence; a window counts the query's own place."""
    reach = min(window or length, length)
    before = reach - reach * (reach - 1) / (2 * length)
    return before if causal else 2 * before - 1


def _embedding_count(config: ModelConfig) -> int:
    width, positions = config.d_model, config.positions
    if config.kind == "vit":
        vision = config.vision
        tokens = (vision.image_size // vision.patch_size) ** 2 + vision.class_token
        tokens *= positions.kind == "learned"
        return (vision.channels * vision.patch_size**2 + 1 + tokens + vision.class_token) * width
    rows = config.vocab_size + config.token_types
    rows += (config.max_length + positions.offset) * (positions.kind == "learned")
    bias = positions.relative_buckets * config.attention.num_heads * (positions.kind == "relative")
    return rows * width + bias * len(_stacks(config))


def _head_count(config: ModelConfig) -> int:
    rows = config.d_model * has_head(config) + config.head_bias
    transform = config.d_model * (config.d_model + 1) * config.head_transform
    return rows * (config.num_classes or config.vocab_size) + transform
