"""Gemma 3n's activation-sparse feed-forward networks: Gaussian top-k on the gate of its first layers (2506.06644).

    a = gelu_tanh(max(g - mean(g) - std(g) Phi^-1(s), 0)),   y = (a * (x W_up)) W_down,   g = x W_gate

`s` is the layer's `activation_sparsity_pattern`: 0.95 in ten layers, 0 in the others. The network around them (AltUp's four
streams, LAuReL, an embedding per layer, keys and values shared between layers) is not here; as a model it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, linear
from sparsejax.models.config import FFNConfig
from sparsejax.models.families.keys import Keys, activations, shortest_period
from sparsejax.plugs import ConfigError

SPARSE_LAYERS, SPARSITY = 10, 0.95  # what an absent pattern means in a model of more layers than that
_PARTS = "AltUp (altup_*), LAuReL (laurel_rank), per-layer embeddings (*_per_layer_input) and num_kv_shared_layers"

ENTRIES: tuple[Entry, ...] = tuple(
    part
    for name in ("gate", "up", "down")
    for part in linear(f"blocks.{{layer}}.mlp.{name}", f"model.layers.{{layer}}.mlp.{name}_proj")
)


class FeedPreset(NamedTuple):
    """For a ModelConfig: `ffn` and, one for each layer or a period of them, `feed_pattern`."""

    ffn: FFNConfig
    feed_pattern: tuple[str, ...]


def read_feeds(published: Mapping[str, Any]) -> FeedPreset:
    """The feed-forward networks of a Gemma 3n text config.

    Raises:
      ConfigError: layers of several widths, a sparsity that is none, or a gate other than tanh-GELU in a sparse layer.
    """
    keys = Keys(published, "gemma3n")
    layers = keys.integer("num_hidden_layers")
    widths = keys.value("intermediate_size")
    several = widths if isinstance(widths, list) else [widths]
    same = len(set(several)) == 1 and type(several[0]) is int and several[0] > 0
    keys.check(same, "intermediate_size", "expected one width for all layers")
    sparse = SPARSE_LAYERS if layers > SPARSE_LAYERS else 0
    pattern = keys.value("activation_sparsity_pattern", [SPARSITY] * sparse + [0.0] * (layers - sparse))
    pattern = pattern if isinstance(pattern, list) else [pattern] * layers
    shares = len(pattern) == layers and all(type(share) in (int, float) and 0 <= share < 1 for share in pattern)
    keys.check(shares, "activation_sparsity_pattern", f"expected a share of zeros below 1 for each of {layers} layers")
    activation = keys.choice("hidden_activation", activations(True), "gelu_pytorch_tanh")
    usable = activation == "geglu_tanh" or not any(pattern)
    keys.check(usable, "hidden_activation", "Gaussian top-k stands behind gelu_pytorch_tanh")
    # 1 - 0.95 is not 0.05 in floating point; ten digits are.
    feeds = [f"ffn:stat_topk_geglu:{1 - share:.10g}" if share else "ffn" for share in pattern]
    return FeedPreset(FFNConfig(hidden=several[0], activation=activation), shortest_period(feeds))


def _refuse(_: Any) -> NoReturn:
    raise ConfigError(
        f"model_type gemma3n: {_PARTS} have no counterpart here, so the model as a whole is neither read nor written; "
        "its sparse feed-forward networks are 'ffn:stat_topk_geglu:0.05' in model.feed_pattern"
    )


register_family(
    Family(
        name="gemma3n",
        architecture="Gemma3nForCausalLM",
        to_config=_refuse,
        to_published=_refuse,
        entries=lambda config: ENTRIES,
        prefix="model.",
    ),
    "gemma3n",
    "gemma3n_text",
)
