"""BERT: an encoder with a norm after each sum, with its masked-token head or without (MiniLM, sentence embeddings).

`sparsejax.io.sentence_embedding` reads how a sentence becomes one vector. The pooler and the next-sentence head are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, Transposed, entry, linear, norm
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys, activations, published_activation
from sparsejax.plugs import check_choice

_BLOCK, _LAYER = "blocks.{layer}", "bert.encoder.layer.{layer}"
_HEAD = "cls.predictions"

ENTRIES: tuple[Entry, ...] = (
    entry("embed.table", "bert.embeddings.word_embeddings.weight"),
    entry("embed.positions", "bert.embeddings.position_embeddings.weight"),
    entry("embed.types", "bert.embeddings.token_type_embeddings.weight"),
    *norm("embed.norm", "bert.embeddings.LayerNorm"),
    *(part for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"))
      for part in linear(f"{_BLOCK}.attn.{ours}", f"{_LAYER}.attention.self.{theirs}")),
    *linear(f"{_BLOCK}.attn.o", f"{_LAYER}.attention.output.dense"),
    *norm(f"{_BLOCK}.attn_norm", f"{_LAYER}.attention.output.LayerNorm"),
    *linear(f"{_BLOCK}.mlp.up", f"{_LAYER}.intermediate.dense"),
    *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.output.dense"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.output.LayerNorm"),
    *linear("head_transform.project", f"{_HEAD}.transform.dense"),
    *norm("head_transform.norm", f"{_HEAD}.transform.LayerNorm"),
    entry("head.kernel", f"{_HEAD}.decoder.weight", Transposed()),
    entry("head.bias", f"{_HEAD}.bias"),
    entry("head_bias", f"{_HEAD}.bias"),
)  # fmt: skip

# Whether the model of this class has the masked-token head. The first of each kind is the one that is written.
ARCHITECTURES = {"BertForMaskedLM": True, "BertForPreTraining": True, "BertModel": False}


def _to_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "bert")
    for key in ("is_decoder", "add_cross_attention"):
        keys.only(key, False, "this makes BERT a decoder")
    keys.only("position_embedding_type", "absolute", "other positions")
    named = keys.value("architectures", ["BertModel"])
    keys.check(isinstance(named, list) and len(named) == 1, "architectures", "expected a list of one name")
    check_choice(f"{keys.where}: architectures (of a bert model)", named[0], ARCHITECTURES)
    head = ARCHITECTURES[named[0]]
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    keys.check(width % heads == 0, "num_attention_heads", f"must divide hidden_size = {width}")
    tied = keys.flag("tie_word_embeddings", True)
    config = ModelConfig(
        kind="encoder",
        num_layers=keys.integer("num_hidden_layers"),
        d_model=width,
        vocab_size=keys.integer("vocab_size"),
        max_length=keys.integer("max_position_embeddings"),
        block="post",
        tied_embeddings=tied or not head,
        token_types=keys.integer("type_vocab_size", 2),
        embedding_norm=True,
        head=head,
        head_transform=head,
        head_bias=head,
        norm=NormConfig(kind="layer", epsilon=keys.number("layer_norm_eps", 1e-12), bias=True),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads, bias=True, out_bias=True),
        ffn=FFNConfig(
            hidden=keys.integer("intermediate_size"),
            activation=keys.choice("hidden_act", activations(False), "gelu"),
            bias=True,
        ),
        positions=PositionConfig(kind="learned"),
    )
    keys.finish("classifier_*", "pooler_*", "directionality")
    return config


def _to_published(config: ModelConfig) -> dict[str, Any]:
    architectures = {has_head: name for name, has_head in reversed(ARCHITECTURES.items())}
    published = {
        "model_type": "bert",
        "architectures": [architectures[config.head]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "intermediate_size": config.ffn.hidden,
        "hidden_act": published_activation(config.ffn.activation, gated=False),
        "layer_norm_eps": config.norm.epsilon,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.token_types,
        "tie_word_embeddings": config.tied_embeddings,
    }
    return check_inverse(config, published, _to_config, "bert")


register_family(
    Family(
        name="bert",
        architecture="BertForMaskedLM",
        to_config=_to_config,
        to_published=_to_published,
        entries=lambda config: ENTRIES,
        prefix="bert.",
        renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),  # files of 2018
        ignored=("bert.embeddings.position_ids", "bert.pooler.*", "cls.seq_relationship.*"),
        tied=(("embed.table", f"{_HEAD}.decoder.weight"), ("head_bias", f"{_HEAD}.decoder.bias")),
    ),
    "bert",
)
