"""The keys of a published `config.json`, read one by one: types are checked, and what nothing has read is refused at the end.

A key that is not known here may change what the model computes, so it is an error unless it is off (false, null, 0 or empty) or
one of those below, which no computation at inference depends on.
"""

from __future__ import annotations

import fnmatch
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sparsejax.plugs import ConfigError, check_choice, nearest

REQUIRED: Any = object()
# Globs of keys about training, text generation, bookkeeping and the reference's own implementation.
IGNORED = (
    "model_type", "architectures", "auto_map", "_name_or_path", "_commit_hash", "transformers_version",
    "transformers.js_config", "unsloth_*", "torch_dtype", "dtype", "tokenizer_class", "*_token_id", "*_token_ids", "prefix",
    "is_llama_config",
    "*dropout*", "*_pdrop", "layerdrop", "initializer_range", "initializer_factor", "init_std", "gradient_checkpointing",
    "use_cache", "cache_implementation", "pretraining_tp", "chunk_size_feed_forward", "torchscript", "return_dict*", "output_*",
    "_attn_implementation*", "attn_implementation", "reorder_and_upcast_attn", "tf_legacy_loss", "is_decoder",
    "summary_*", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "num_return_sequences",
    "temperature", "top_k", "top_p", "typical_p", "*_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens",
)  # fmt: skip

T = TypeVar("T")


class Keys:
    """Typed access to the keys of one JSON object. All methods raise a ConfigError that names the key and what it holds."""

    def __init__(self, published: Mapping[str, Any], family: str, where: str = "config.json"):
        self.published, self.family, self.where = published, family, where
        self._known: set[str] = set()

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.published.get(key) is not None

    def value(self, key: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        """What the key holds; `default` where it is absent, and `null` (else the default) where it holds null."""
        self._known.add(key)
        if self.given(key):
            return self.published[key]
        found = null if key in self.published and null is not REQUIRED else default
        if found is REQUIRED:
            close = nearest(key, set(self.published) - self._known)
            raise ConfigError(f"{self.where}: {key} is missing; a {self.family} model needs it.{close}")
        return found

    def integer(self, key: str, default: Any = REQUIRED, null: Any = REQUIRED, least: int = 1) -> int:
        """A whole number; a default or null is returned as it is."""
        found = self.value(key, default, null)
        if self.given(key):
            whole = type(found) is int or (type(found) is float and found.is_integer())
            self.check(whole and found >= least, key, f"expected a whole number of at least {least}")
            return int(found)
        return found

    def number(self, key: str, default: Any = REQUIRED, null: Any = REQUIRED, above: float = 0.0) -> float:
        """A finite number; a default or null is returned as it is."""
        found = self.value(key, default, null)
        if self.given(key):
            finite = type(found) in (int, float) and math.isfinite(found)
            self.check(finite and found > above, key, f"expected a number above {above:g}")
            return float(found)
        return found

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        found = self.value(key, default)
        self.check(type(found) is bool, key, "expected true or false")
        return found

    def choice(self, key: str, allowed: Mapping[str, T], default: Any = REQUIRED) -> T:
        """What `allowed` has under the string that the key holds."""
        found = self.value(key, default)
        self.check(isinstance(found, str), key, "expected a string")
        check_choice(f"{self.where}: {key} (of a {self.family} model)", found, allowed)
        return allowed[found]

    def only(self, key: str, supported: Any, why: str) -> None:
        """Refuse every value but the one that this model can compute, which is also what an absent key means."""
        self.check(self.value(key, supported) == supported, key, f"{why}; only {supported!r} is supported")

    def inner(self, key: str) -> Keys:
        """The keys of an object inside this one; of an empty one where the key is absent."""
        found = self.value(key, {})
        self.check(isinstance(found, Mapping), key, "expected an object")
        return Keys(found, self.family, f"{self.where}: {key}")

    def check(self, condition: Any, key: str, rule: str) -> None:
        """Raise unless the condition holds."""
        if not condition:
            raise ConfigError(f"{self.where}: {key} = {reprlib.repr(self.published.get(key))}: {rule}")

    def finish(self, *ignored: str) -> None:
        """Refuse what nothing has read; `ignored` are further globs of keys that do not matter to this family."""
        for key, value in self.published.items():
            if key in self._known or not value:
                continue
            if not any(fnmatch.fnmatchcase(key, glob) for glob in (*IGNORED, *ignored)):
                self.check(False, key, f"is not known of a {self.family} model and may change what it computes; "
                                       "remove the key if it does not")


# Published name -> ours. Where several mean one function, the first is the one that is written.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu", "relu2": "relu2",
    "quick_gelu": "quick_gelu", "mish": "mish", "hardswish": "hard_swish", "sigmoid": "sigmoid", "linear": "identity",
}  # fmt: skip
# The name of the gated form of each function that has one.
GATED = {
    "silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu", "relu2": "relu2glu", "sigmoid": "glu",
    "identity": "bilinear",
}  # fmt: skip


def activations(gated: bool) -> dict[str, str]:
    """Published name -> ours, of a plain or a gated feed-forward network."""
    return {theirs: GATED[ours] for theirs, ours in ACTIVATIONS.items() if ours in GATED} if gated else ACTIVATIONS


def published_activation(name: str, gated: bool) -> str:
    """The name that a `config.json` gives one of our activations.

    Raises:
      ConfigError: none.
    """
    by_name: dict[str, str] = {}
    for theirs, ours in activations(gated).items():
        by_name.setdefault(ours, theirs)
    kind = "gated" if gated else "plain"
    check_choice(f"model.ffn.activation (of a {kind} feed-forward network to publish)", name, by_name)
    return by_name[name]


LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


def layer_pattern(keys: Keys, layers: int, default: Sequence[str]) -> tuple[str, ...]:
    """`attention_pattern` from `layer_types`; `default` (ours, per layer) where the key is absent."""
    names = keys.value("layer_types", None)
    if names is None:
        return shortest_period(default)
    complete = isinstance(names, list) and len(names) == layers
    keys.check(complete, "layer_types", f"expected one name for each of {layers} layers")
    for name in names:
        check_choice(f"{keys.where}: layer_types (of a {keys.family} model)", name, LAYER_TYPES)
    return shortest_period([LAYER_TYPES[name] for name in names])


def published_layers(pattern: Sequence[str], layers: int) -> list[str]:
    """`layer_types` of an `attention_pattern`."""
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    return [names[pattern[layer % len(pattern)]] for layer in range(layers)]


def shortest_period(items: Sequence[str]) -> tuple[str, ...]:
    """The least leading part that gives all items when it is repeated."""
    for period in range(1, len(items)):
        if all(item == items[place % period] for place, item in enumerate(items)):
            return tuple(items[:period])
    return tuple(items)
