"""What the fields of a config may hold, one by one and together."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.sharding import AbstractMesh

from sparsejax import plugs
from sparsejax.config_text import leaves
from sparsejax.layers.linear import Init
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import is_gated
from sparsejax.nnx_compat import ROLES, Structure
from sparsejax.parallel.mesh import AXES, mesh_sizes
from sparsejax.parallel.rules import check_batch
from sparsejax.plugs import ConfigError, check, check_choice

if TYPE_CHECKING:
    from sparsejax.config import ExperimentConfig


class Bound(NamedTuple):
    """Least and greatest value of a numeric field; `above` excludes the least, `below` the greatest."""

    least: float
    greatest: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.least if self.above else value >= self.least) and (
            value < self.greatest if self.below else value <= self.greatest
        )

    def __str__(self) -> str:
        least = f"{'more than' if self.above else 'at least'} {self.least:g}"
        if self.greatest == math.inf:
            return f"must be {least}"
        return f"must be {least} and {'less than' if self.below else 'at most'} {self.greatest:g}"


CHOICES: dict[str, tuple[str, ...]] = {
    "model.kind": ("decoder", "encoder", "encoder_decoder", "vit"),
    "model.block": ("pre", "post", "parallel", "sandwich"),
    "model.pool": ("mean", "class"),
    "model.dtype": ("float32", "bfloat16"),
    "model.residual_dtype": ("", "float32", "bfloat16"),
    "model.norm.kind": ("rms", "layer", "none"),
    "model.attention.qk_norm_over": ("head", "projection"),
    "model.attention.backend": ("auto", "blocked", "xla", "cudnn"),
    "model.ffn.match": ("parameters", "flops"),
    "model.positions.kind": ("rope", "learned", "sinusoidal", "relative", "none"),
    "optimizer.schedule": ("constant", "cosine", "wsd", "inverse_sqrt"),
    "checkpoint.on_nan": ("stop", "skip", "rollback"),
}
ITEM_CHOICES: dict[str, tuple[str, ...]] = {
    "model.attention_pattern": ("global", "local"),
    "log.writers": ("csv", "jsonl", "tensorboard", "wandb"),
    "optimizer.decay_roles": ROLES,
}
_POSITIVE, _COUNT, _SHARE = Bound(0, above=True), Bound(0), Bound(0, 1)
BOUNDS: dict[str, Bound] = {
    "seed": Bound(0, 2**32, below=True),
    "steps": Bound(1),
    "batch_size": Bound(1),
    "accumulate": Bound(1),
    "model.num_layers": Bound(1),
    "model.encoder_layers": _COUNT,
    "model.d_model": Bound(1),
    "model.vocab_size": _COUNT,
    "model.num_classes": _COUNT,
    "model.max_length": _COUNT,
    "model.token_types": _COUNT,
    "model.layer_scale": _COUNT,
    "model.head_scale": _POSITIVE,
    "model.head_softcap": _COUNT,
    "model.unroll": _COUNT,
    "model.norm.epsilon": _POSITIVE,
    "model.attention.num_heads": Bound(1),
    "model.attention.num_kv_heads": _COUNT,
    "model.attention.head_dim": _COUNT,
    "model.attention.scale": _COUNT,
    "model.attention.softcap": _COUNT,
    "model.attention.window": _COUNT,
    "model.ffn.hidden": _COUNT,
    "model.positions.offset": _COUNT,
    "model.positions.relative_buckets": Bound(4),
    "model.positions.relative_max_distance": Bound(2),
    "model.positions.rope.theta": Bound(1, above=True),
    "model.positions.rope.local_theta": _COUNT,
    "model.positions.rope.fraction": Bound(0, 1, above=True),
    "model.vision.image_size": Bound(1),
    "model.vision.channels": Bound(1),
    "model.vision.patch_size": Bound(1),
    "data.sequence_length": Bound(1),
    "data.prefetch": _COUNT,
    "data.train_images": _COUNT,
    "data.label_noise": _SHARE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _COUNT,
    "optimizer.decay_fraction": _SHARE,
    "optimizer.final_fraction": _SHARE,
    "optimizer.weight_decay": _COUNT,
    "optimizer.clip_norm": _COUNT,
    "optimizer.ema_decay": Bound(0, 1, below=True),
    "mesh.data": Bound(-1),
    "mesh.fsdp": Bound(-1),
    "mesh.tensor": Bound(-1),
    "mesh.expert": Bound(-1),
    "mesh.sequence": Bound(-1),
    "checkpoint.every": _COUNT,
    "checkpoint.keep": Bound(1),
    "checkpoint.spike_factor": _COUNT,
    "log.every": Bound(1),
    "log.watch_every": _COUNT,
    "log.peak_flops": _COUNT,
    "evaluate.every": _COUNT,
    "evaluate.batches": Bound(1),
    "evaluate.sample_tokens": _COUNT,
}
# Fields whose text is a spec, a path or free; everything else is in one of the tables above (a test compares).
FREE_TEXT = ("name", "init", "data.data_dir", "evaluate.sample_prompt")
SPECS = (
    "objectives", "data.source", "data.tokenizer", "data.task", "model.feed_pattern", "model.ffn.activation", "model.inputs",
    "model.weights", "model.neurons", "model.residuals", "model.init", "model.remat", "model.positions.rope.scaling",
    "model.attention.cache_format", "optimizer.name", "optimizer.arguments", "optimizer.train", "evaluate.corruptions",
)
# Fields of a pretrained model that a run may set otherwise: methods, and how the same sums are computed.
INIT_MAY_CHANGE = (
    "inputs", "weights", "neurons", "residuals", "ffn.activation", "dtype", "residual_dtype", "scan", "unroll", "remat",
    "attention.backend", "attention.cache_format",
)
INIT_TOKENIZER = "init"


def check_fields(config: ExperimentConfig) -> None:
    """Every field on its own: choices, bounds, and names that the registries know."""
    for path, value in leaves(config).items():
        if path in CHOICES:
            check_choice(path, value, CHOICES[path])
        elif path in ITEM_CHOICES:
            for index, item in enumerate(value):
                check_choice(f"{path}[{index}]", item, ITEM_CHOICES[path])
                check(path == "model.attention_pattern" or value.index(item) == index, f"{path}[{index}]", item, "given twice")
        elif path in BOUNDS:
            check(BOUNDS[path].holds(value), path, value, str(BOUNDS[path]))
    for path in ("model.attention_pattern", "model.feed_pattern", "objectives"):
        check(leaves(config)[path], path, (), "must not be empty")
    name = config.name
    usable = name.strip() and name not in (".", "..") and not set(name) & set("/\\\0\n")
    check(usable, "name", name, "must be the name of a folder")
    check_choice("model.remat", config.model.remat, _remat_names(config.model.remat))
    _check_rope_scaling(config.model.positions.rope.scaling)


def _remat_names(wanted: str) -> tuple[str, ...]:
    if wanted == "none":
        return ("none",)
    from sparsejax.layers.stack import REMAT_POLICIES  # imports all of attention; most configs do not ask

    return ("none", *REMAT_POLICIES)


def _check_rope_scaling(text: str) -> None:
    field = "model.positions.rope.scaling"
    name, _, tail = text.partition(":")
    counts = {"none": 0, "linear": 1, "llama3": 4}
    check_choice(field, name, counts)
    values = [value for value in tail.split(",") if value]
    shape = "none, linear:FACTOR or llama3:FACTOR,LOW,HIGH,ORIGINAL_LENGTH"
    check(len(values) == counts[name], field, text, f"expected {shape}")
    try:
        numbers = [float(value) for value in values]
    except ValueError as error:
        raise ConfigError(f"{field} = {text!r}: expected {shape}") from error
    check(all(math.isfinite(n) and n > 0 for n in numbers), field, text, "the numbers must be positive")


def check_init(config: ExperimentConfig) -> None:
    """What a pretrained model brings with it is not asked for twice."""
    known = (type(config.data)().tokenizer, INIT_TOKENIZER)
    check(config.data.tokenizer in known, "data.tokenizer", config.data.tokenizer,
          f"init = {config.init!r} brings its own tokenizer; leave it out")


def started_from(model: ModelConfig, start: ModelConfig, name: str) -> ModelConfig:
    """The config of a pretrained model with the method fields of `model` that are not at their defaults.

    Args:
      model: as a config file and its overrides have it; a field at its default is the pretrained model's.
      start: the pretrained model's, finalized.
      name: what `init` names.
    Raises:
      ConfigError: a field that would make another model of it.
    """
    defaults, theirs, own = leaves(ModelConfig()), leaves(start), leaves(model)
    result = copy.deepcopy(start)
    for path, value in own.items():
        if value in (defaults[path], theirs[path]):
            continue
        check(path in INIT_MAY_CHANGE, f"model.{path}", value,
              f"init = {name!r} has {theirs[path]!r}; leave it out. A run may change {', '.join(INIT_MAY_CHANGE)}")
        group, _, field = path.rpartition(".")
        setattr(getattr(result, group) if group else result, field, value)
    before, after = (plugs.resolve("nonlinearity", m.ffn.activation, "model.ffn.activation") for m in (start, result))
    shapes = [(spec.gated, spec.halves) for spec in (before, after)]
    check(shapes[0] == shapes[1], "model.ffn.activation", result.ffn.activation,
          f"init = {name!r} has {start.ffn.activation!r}, whose maps are others (a gate, or a doubled up map)")
    return result


def resolve_names(config: ExperimentConfig) -> dict[str, Any]:
    """The specs behind the names in a config; unknown names raise."""
    data, model = config.data, config.model
    for index, text in enumerate(config.objectives):
        check(config.objectives.index(text) == index, f"objectives[{index}]", text, "given twice")
    return {
        "objectives": [plugs.resolve("objective", text, f"objectives[{i}]") for i, text in enumerate(config.objectives)],
        "feeds": [plugs.resolve("feed", text, f"model.feed_pattern[{i}]") for i, text in enumerate(model.feed_pattern)],
        "activation": plugs.resolve("nonlinearity", model.ffn.activation, "model.ffn.activation"),
        "source": plugs.resolve("source", data.source, "data.source"),
        "task": plugs.resolve("task", data.task, "data.task"),
        "tokenizer": plugs.resolve("tokenizer", data.tokenizer, "data.tokenizer"),
        "corruptions": [plugs.resolve("corruption", text, "evaluate.corruptions") for text in config.evaluate.corruptions],
    }


def check_model(model: ModelConfig) -> None:
    """What the fields of a model, its derived ones filled in, ask of each other."""
    a, positions, rope = model.attention, model.positions, model.positions.rope
    check(a.num_heads % a.num_kv_heads == 0, "model.attention.num_kv_heads", a.num_kv_heads,
          f"must divide num_heads = {a.num_heads}")
    local = "local" in model.attention_pattern
    check(bool(a.window) == local, "model.attention.window", a.window,
          "a 'local' layer in attention_pattern needs a window" if local else "no layer of attention_pattern is 'local'")
    check(local or not rope.local_theta, "model.positions.rope.local_theta", rope.local_theta,
          "no layer of attention_pattern is 'local'")
    if positions.kind == "rope":
        rotated = a.head_dim * rope.fraction
        check(rotated % 2 == 0, "model.attention.head_dim", a.head_dim,
              f"rope rotates pairs: head_dim * fraction = {rotated:g} must be an even number")
    else:
        check(rope.scaling == "none", "model.positions.rope.scaling", rope.scaling, f"positions.kind is {positions.kind!r}")
    check(not positions.offset or positions.kind == "learned", "model.positions.offset", positions.offset,
          f"only learned positions have an offset, positions.kind is {positions.kind!r}")
    norm = model.norm
    check(not norm.bias or norm.kind == "layer", "model.norm.bias", norm.bias, f"norm.kind {norm.kind!r} has no bias")
    check(not norm.plus_one or norm.kind != "none", "model.norm.plus_one", norm.plus_one, "norm.kind is 'none'")
    check(norm.kind != "none" or model.block not in ("post", "sandwich"), "model.block", model.block, "norm.kind is 'none'")
    check(a.qk_norm or a.qk_norm_over == "head", "model.attention.qk_norm_over", a.qk_norm_over, "qk_norm is False")
    Init.parse(model.init)
    check_cache(model)
    _check_head(model)
    _check_kind(model)


def check_cache(model: ModelConfig) -> None:
    """Raise a ConfigError unless keys and values can be kept as `model.attention.cache_format` says."""
    text = model.attention.cache_format
    if text == "dense":
        return
    from sparsejax.layers.cache import cache_format  # imports all of attention; most configs do not ask

    check(model.kind in ("decoder", "encoder_decoder"), "model.attention.cache_format", text,
          f"model.kind {model.kind!r} keeps no keys and values")
    cache_format(text, model.attention.head_dim)


def _check_head(model: ModelConfig) -> None:
    """What an output head needs, and what a model without one cannot have."""
    if model.head_transform:
        check(not is_gated(model), "model.head_transform", True, f"ffn.activation = {model.ffn.activation!r} takes two tensors")
    if model.head:
        return
    for field in ("num_classes", "head_bias", "head_transform", "head_softcap"):
        check(not getattr(model, field), f"model.{field}", getattr(model, field), "model.head is False")
    check(model.tied_embeddings, "model.tied_embeddings", False, "model.head is False")


def _check_kind(model: ModelConfig) -> None:
    """What one kind of model has and another has not."""
    kind, vision = model.kind, model.vision
    check(not model.encoder_layers or kind == "encoder_decoder", "model.encoder_layers", model.encoder_layers,
          f"model.kind {kind!r} has no second stack; set num_layers")
    check(not model.token_types or kind == "encoder", "model.token_types", model.token_types,
          f"model.kind is {kind!r}, not 'encoder'")
    check(not (kind == "encoder_decoder" and model.block == "parallel"), "model.block", model.block,
          "cross-attention reads what self-attention has added; a parallel block has no such order")
    check(not (kind == "decoder" and model.num_classes and model.pool == "class"), "model.pool", model.pool,
          "the first token of a decoder sees nothing but itself; allowed is 'mean'")
    if kind != "vit":
        return
    check(not model.embedding_norm, "model.embedding_norm", True, "a vit reads no tokens")
    check(vision.image_size % vision.patch_size == 0, "model.vision.patch_size", vision.patch_size,
          f"must divide image_size = {vision.image_size}")
    check_choice("model.positions.kind", model.positions.kind, ("learned", "none"))
    check(vision.class_token or model.pool != "class", "model.pool", model.pool, "vision.class_token is False")


def check_images(config: ExperimentConfig, shape: tuple[int, int, int] | None) -> None:
    """Whether the images (height, width, channels) of an opened data source are those that the model is made for."""
    if shape is None:
        return
    vision, *sides, channels = config.model.vision, *shape
    images = f"the images of data.source = {config.data.source!r} are {' x '.join(map(str, shape))}"
    check(sides == [vision.image_size] * 2, "model.vision.image_size", vision.image_size, images)
    check(channels == vision.channels, "model.vision.channels", vision.channels, images)


def check_task(config: ExperimentConfig, specs: dict[str, Any]) -> None:
    """Whether the model can be trained on this task, and the task be made of this source."""
    kind, task, source, length = config.model.kind, specs["task"], specs["source"], config.data.sequence_length
    check(kind in task.model_kinds, "data.task", config.data.task,
          f"does not fit model.kind = {kind!r}, only {_listed(task.model_kinds)}")
    if source.content:  # empty: only the opened source tells (tfds), and `build_data` checks it
        check(source.content in task.content, "data.source", config.data.source,
              f"holds {source.content}, data.task = {config.data.task!r} needs {_listed(task.content)}")
        check((source.content == "images") == (kind == "vit"), "data.source", config.data.source,
              f"holds {source.content}, model.kind is {kind!r}")
    corruptions = config.evaluate.corruptions
    check(not corruptions or kind == "vit", "evaluate.corruptions", corruptions, f"are of images, model.kind is {kind!r}")
    sampled = config.evaluate.sample_tokens
    check(not sampled or kind == "decoder", "evaluate.sample_tokens", sampled, f"model.kind {kind!r} does not generate text")
    check(not sampled or source.content != "symbols", "evaluate.sample_tokens", sampled,
          f"data.source {config.data.source!r} is not text")
    if kind == "vit":
        return
    if source.content == "symbols":
        source.check_length(length)
    else:
        task.shapes(length, kind)
    check(config.model.max_length >= length, "model.max_length", config.model.max_length,
          f"must be at least data.sequence_length = {length}")


def _listed(values: Sequence[str]) -> str:
    return " or ".join(repr(value) for value in values)


def check_training(config: ExperimentConfig) -> None:
    """Optimizer, schedule, checkpoints and batches."""
    from sparsejax.train import optim

    optimizer, steps = config.optimizer, config.steps
    check(config.model.head, "model.head", False, "a run trains the outputs of a head")
    optim.optimizer(optimizer, steps, Structure(None, (), ()))  # knows its arguments; builds closures, computes nothing
    check(config.batch_size % config.accumulate == 0, "batch_size", config.batch_size,
          f"must be a multiple of accumulate = {config.accumulate}")
    checkpoint = config.checkpoint
    check(checkpoint.every or checkpoint.on_nan != "rollback", "checkpoint.every", checkpoint.every,
          "on_nan = 'rollback' needs checkpoints to roll back to")
    spike = checkpoint.spike_factor
    check(not spike or spike > 1, "checkpoint.spike_factor", spike, "must be more than 1, or 0 for off")


def check_mesh(config: ExperimentConfig, feeds: Sequence[Any], device_count: int | None) -> None:
    """Whether the mesh fits the devices (where their number is known), and the model and batch fit the mesh."""
    given = [size for size in (getattr(config.mesh, axis) for axis in AXES) if size > 0]
    sizes = mesh_sizes(config.mesh, device_count or math.prod(given))
    model = config.model
    check_batch(config.batch_size // config.accumulate, AbstractMesh(tuple(sizes.values()), AXES))  # type: ignore[arg-type]
    for axis, field, value in (
        ("tensor", "model.attention.num_heads", model.attention.num_heads),
        ("tensor", "model.ffn.hidden", model.ffn.hidden),
        ("sequence", "data.sequence_length", config.data.sequence_length),
    ):
        check(value % sizes[axis] == 0, field, value, f"must be a multiple of mesh.{axis} = {sizes[axis]}")
    for index, feed in enumerate(feeds):
        experts = getattr(feed, "experts", 0)
        check(experts % sizes["expert"] == 0, f"model.feed_pattern[{index}]: experts", experts,
              f"must be a multiple of mesh.expert = {sizes['expert']}")
