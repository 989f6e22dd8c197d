"""Keys and values kept in few bits: each token of each head with a scale and a minimum of its own.

KV4 of "COMET: Towards Practical W4A4KV4 LLMs Serving" (Liu et al., 2024, arXiv 2410.12168), KV8 likewise. Acts on what
self-attention of a decoder keeps, after rotary positions (`layers.cache`): k, v [B, T, G, K], over the K of a head or groups,

    s = (max x - min x) / (2^b - 1)    q = round((x - min x) / s)    x^ = s q + min x        s and min stored as float16

Codes are packed at b bits, so that 4 bits of 64 channels take 4.5 with scales. Nothing is fitted: a token is rounded as it is
appended and never again. Texts that are scored without a cache see the same rounded keys and values, at every token. Queries
stay as they are, and cross-attention keeps nothing. Left out: scales by channel over several tokens (KIVI), which rewrite what
was appended; products of the codes themselves: keys are decoded as they are read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from sparsejax.compress.recipe import ACTIVATIONS, Pass, Work
from sparsejax.config_rules import check_cache
from sparsejax.io.model import Model
from sparsejax.models.config import ModelConfig
from sparsejax.models.serving import cache_bytes
from sparsejax.plugs import ConfigError

FORMATS = {bits: f"int{bits}:asym,token,zero=min,scale=f16" for bits in (2, 3, 4, 8)}


@dataclass
class KvCache(Pass):
    """format: of keys and values, a number format whose scales belong to one token (`layers.cache.cache_format`)."""

    format: str = FORMATS[4]
    stage: ClassVar[str] = ACTIVATIONS
    experts: ClassVar[bool] = True

    def check(self, config: ModelConfig) -> None:
        try:
            check_cache(_with_format(config, self.format))
        except ConfigError as error:
            raise ConfigError(f"format: {error}") from error

    def apply(self, model: Model, work: Work) -> Model:
        changed = with_cache_format(model, self.format)
        before, after = (cache_bytes(one.config) for one in (model, changed))
        a = model.config.attention
        numbers = 2 * model.config.num_layers * a.num_kv_heads * a.head_dim
        found = dict(token_bytes=after, token_bytes_before=before, bits_per_number=8 * after / numbers)
        work.note(self.name, format=self.format, **found)
        return changed


def with_cache_format(model: Model, text: str, field: str = "cache format") -> Model:
    """The same model that keeps its keys and values in another format.

    Raises:
      ConfigError: the format does not fit; begins with `field`.
    """
    config = _with_format(model.config, text)
    try:
        check_cache(config)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    return model.rebuilt(config, {})


def _with_format(config: ModelConfig, text: str) -> ModelConfig:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, cache_format=text))
