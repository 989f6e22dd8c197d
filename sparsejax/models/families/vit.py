"""ViT (2010.11929) as an image classifier or without a head, and DINOv2 (2304.07193), whose blocks have layer scales.

Images are float32 [B, Y, X, C] here, normalised as the model's preprocessing says. Of another size than the trained one they
take bicubically interpolated positions, as DINOv2 in the reference does by itself and ViT on demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, Fused, Patches, Reshaped, Transposed, entry, linear, norm
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig, VisionConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys, activations, published_activation
from sparsejax.plugs import check, check_choice

_BLOCK, _LAYER = "blocks.{layer}", "encoder.layer.{layer}"


def _shared_entries(config: ModelConfig, prefix: str) -> tuple[Entry, ...]:
    """Embeddings, attention and last norm, which both families name alike."""
    vision, width, embeddings = config.vision, config.d_model, f"{prefix}embeddings"
    rows = config.max_length
    patches = f"{embeddings}.patch_embeddings.projection"
    attention = f"{prefix}{_LAYER}.attention"
    return (
        entry("embed.class_token", f"{embeddings}.cls_token"),
        entry("embed.positions", f"{embeddings}.position_embeddings", Reshaped((rows, width), (1, rows, width))),
        entry("embed.project.kernel", f"{patches}.weight", Patches(vision.patch_size, vision.channels)),
        entry("embed.project.bias", f"{patches}.bias"),
        *(part for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"))
          for part in linear(f"{_BLOCK}.attn.{ours}", f"{attention}.attention.{theirs}")),
        *linear(f"{_BLOCK}.attn.o", f"{attention}.output.dense"),
        *norm("norm", f"{prefix}layernorm"),
    )  # fmt: skip


def _vit_entries(config: ModelConfig) -> tuple[Entry, ...]:
    layer = f"vit.{_LAYER}"
    return (
        *_shared_entries(config, "vit."),
        *norm(f"{_BLOCK}.attn_norm", f"{layer}.layernorm_before"),
        *norm(f"{_BLOCK}.mlp_norm", f"{layer}.layernorm_after"),
        *linear(f"{_BLOCK}.mlp.up", f"{layer}.intermediate.dense"),
        *linear(f"{_BLOCK}.mlp.down", f"{layer}.output.dense"),
        *linear("head", "classifier"),
    )


def _dinov2_entries(config: ModelConfig) -> tuple[Entry, ...]:
    hidden, entering = config.ffn.hidden, tuple(f"{_BLOCK}.mlp.{name}" for name in ("gate", "up"))
    gated = config.ffn.activation == "swiglu"
    fused = (
        entry(tuple(f"{name}.kernel" for name in entering), f"{_LAYER}.mlp.weights_in.weight",
              Fused((hidden, hidden), each=Transposed())),
        entry(tuple(f"{name}.bias" for name in entering), f"{_LAYER}.mlp.weights_in.bias", Fused((hidden, hidden))),
        *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.mlp.weights_out"),
    )  # fmt: skip
    plain = (*linear(f"{_BLOCK}.mlp.up", f"{_LAYER}.mlp.fc1"), *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.mlp.fc2"))
    return (
        *_shared_entries(config, ""),
        *norm(f"{_BLOCK}.attn_norm", f"{_LAYER}.norm1"),
        *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.norm2"),
        entry(f"{_BLOCK}.attn_scale", f"{_LAYER}.layer_scale1.lambda1"),
        entry(f"{_BLOCK}.mlp_scale", f"{_LAYER}.layer_scale2.lambda1"),
        *(fused if gated else plain),
    )


def _read(keys: Keys, ffn: FFNConfig, epsilon: float) -> ModelConfig:
    """What both families say alike."""
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    keys.check(width % heads == 0, "num_attention_heads", f"must divide hidden_size = {width}")
    image, patch = keys.integer("image_size", 224), keys.integer("patch_size")
    keys.check(image % patch == 0, "image_size", f"must be a multiple of patch_size = {patch}")
    return ModelConfig(
        kind="vit",
        num_layers=keys.integer("num_hidden_layers"),
        d_model=width,
        max_length=(image // patch) ** 2 + 1,
        pool="class",
        norm=NormConfig(kind="layer", epsilon=keys.number("layer_norm_eps", epsilon), bias=True),
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=heads, head_dim=width // heads, bias=keys.flag("qkv_bias", True), out_bias=True
        ),
        ffn=ffn,
        positions=PositionConfig(kind="learned"),
        vision=VisionConfig(image, keys.integer("num_channels", 3), patch, class_token=True),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "layer_norm_eps": config.norm.epsilon,
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
        "num_channels": config.vision.channels,
        "qkv_bias": config.attention.bias,
    }


def _architecture(keys: Keys, allowed: Mapping[str, bool], default: str) -> bool:
    named = keys.value("architectures", [default])
    keys.check(isinstance(named, list) and len(named) == 1, "architectures", "expected a list of one name")
    check_choice(f"{keys.where}: architectures (of a {keys.family} model)", named[0], allowed)
    return allowed[named[0]]


def _vit_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "vit")
    head = _architecture(keys, {"ViTForImageClassification": True, "ViTModel": False}, "ViTModel")
    activation = keys.choice("hidden_act", activations(False), "gelu")
    config = _read(keys, FFNConfig(hidden=keys.integer("intermediate_size"), activation=activation, bias=True), 1e-12)
    config.head = config.head_bias = head
    config.num_classes = _number_of_classes(keys) if head else 0
    keys.finish("encoder_stride", "pooler_*")
    return config


def _number_of_classes(keys: Keys) -> int:
    labels = keys.value("id2label", None)
    if labels is None:
        return keys.integer("num_labels", 2)  # as in the reference
    keys.check(isinstance(labels, Mapping) and labels, "id2label", "expected an object with a name for each class")
    return len(labels)


def _vit_published(config: ModelConfig) -> dict[str, Any]:
    names = [f"LABEL_{index}" for index in range(config.num_classes)]
    labels: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    published = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if config.head else "ViTModel"],
        **_write(config),
        "intermediate_size": config.ffn.hidden,
        "hidden_act": published_activation(config.ffn.activation, gated=False),
        **(labels if config.head else {}),
    }
    return check_inverse(config, published, _vit_config, "vit")


def _dinov2_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "dinov2")
    _architecture(keys, {"Dinov2Model": False}, "Dinov2Model")
    ratio, gated = keys.number("mlp_ratio", 4), keys.flag("use_swiglu_ffn", False)
    hidden = _hidden(keys.integer("hidden_size"), ratio, gated)
    activation = keys.choice("hidden_act", activations(False), "gelu")
    config = _read(keys, FFNConfig(hidden=hidden, activation="swiglu" if gated else activation, bias=True), 1e-6)
    config.head, config.layer_scale = False, keys.number("layerscale_value", 1.0)
    # Of its use as a backbone or in pre-training; its last hidden state depends on none of them.
    keys.finish("drop_path_rate", "out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states",
                "use_mask_token", "preprocessor_config", "head")  # fmt: skip
    return config


def _hidden(width: int, ratio: float, gated: bool) -> int:
    """F of a DINOv2; a gated network has two thirds of the plain one's, rounded up to a multiple of 8."""
    plain = int(width * ratio)
    return (int(plain * 2 / 3) + 7) // 8 * 8 if gated else plain


def _dinov2_published(config: ModelConfig) -> dict[str, Any]:
    width, hidden, gated = config.d_model, config.ffn.hidden, config.ffn.activation == "swiglu"
    # transformers 5 refuses a ratio that is not whole.
    ratio = next((ratio for ratio in range(1, 2 * hidden // width + 2) if _hidden(width, ratio, gated) == hidden), None)
    multiple = "two thirds, in multiples of 8, of a multiple of d_model" if gated else "a multiple of d_model"
    check(ratio, "model.ffn.hidden", hidden, f"a dinov2 config.json gives {multiple} = {width}")
    published = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        **_write(config),
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else published_activation(config.ffn.activation, gated=False),
        "layerscale_value": config.layer_scale,
        "use_mask_token": False,
    }
    return check_inverse(config, published, _dinov2_config, "dinov2")


register_family(
    Family(
        name="vit",
        architecture="ViTForImageClassification",
        to_config=_vit_config,
        to_published=_vit_published,
        entries=_vit_entries,
        prefix="vit.",
        ignored=("vit.pooler.*", "vit.embeddings.mask_token"),
    ),
    "vit",
)
register_family(
    Family(
        name="dinov2",
        architecture="Dinov2Model",
        to_config=_dinov2_config,
        to_published=_dinov2_published,
        entries=_dinov2_entries,
        ignored=("embeddings.mask_token",),
    ),
    "dinov2",
)
