"""ExperimentConfig: everything a run is made of, and `finalize`, the one place that derives and validates it.

No postponed annotations in the files of the config classes: config_flags reads the type of a field as it stands.
"""

from dataclasses import dataclass, field
from typing import Any

from sparsejax import config_rules
from sparsejax.config_text import checked
from sparsejax.data.config import DataConfig
from sparsejax.models.config import ModelConfig
from sparsejax.models.site_rules import check_sites
from sparsejax.models.sizes import ffn_width
from sparsejax.parallel.config import MeshConfig
from sparsejax.plugs import check
from sparsejax.train.config import CheckpointConfig, EvaluateConfig, LogConfig, OptimizerConfig


@dataclass
class ExperimentConfig:
    name: str = "run"
    init: str = ""  # the model to start from: a name or path as --model takes; "": drawn from the seed
    seed: int = 0
    steps: int = 100
    batch_size: int = 16  # examples per optimizer step, over all hosts
    accumulate: int = 1  # microbatches per optimizer step
    objectives: tuple[str, ...] = ("cross_entropy",)  # registry kind "objective", summed: "cross_entropy", "z_loss:1e-4", ...
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def finalize(
    config: ExperimentConfig,
    *,
    vocab_size: int | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    device_count: int | None = None,
    start: ModelConfig | None = None,
) -> ExperimentConfig:
    """The config with everything derived and everything checked; the one given is left as it is.

    Runs once, after overrides, and touches no device and no data. What only those know may be given: finalizing a finalized
    config again, with them, completes it.

    Args:
      config: from a file's `get_config`, with overrides.
      vocab_size: the built tokenizer's, where its spec alone does not tell.
      num_classes: the opened data source's, for classification.
      image_shape: (height, width, channels) of the opened data source's images.
      device_count: all devices of all hosts; checks the mesh against it.
      start: finalized config of the model that `init` names, which `config.model` is made of; until it is known, what depends
        on the model stays open.
    Raises:
      ConfigError: names the field, its value, what is allowed and the nearest valid name.
    """
    config = checked(config)
    config_rules.check_fields(config)
    specs = config_rules.resolve_names(config)
    if config.init:
        config_rules.check_init(config)
        config.data.tokenizer = config_rules.INIT_TOKENIZER
        if start is None:
            config_rules.check_training(config)
            return config
        config.model = config_rules.started_from(config.model, start, config.init)
        specs = config_rules.resolve_names(config)
    _derive(config, specs, vocab_size, num_classes)
    config_rules.check_task(config, specs)
    config_rules.check_model(config.model)
    config_rules.check_images(config, image_shape)
    check_sites(config.model)
    config_rules.check_training(config)
    config_rules.check_mesh(config, specs["feeds"], device_count)
    return config


def _derive(config: ExperimentConfig, specs: dict[str, Any], vocab_size: int | None, num_classes: int | None) -> None:
    """Fill in the zeros that mean "derive it"."""
    model, a = config.model, config.model.attention
    if not a.head_dim:
        check(model.d_model % a.num_heads == 0, "model.attention.num_heads", a.num_heads,
              f"must divide d_model = {model.d_model}")
    a.head_dim = a.head_dim or model.d_model // a.num_heads
    a.num_kv_heads = a.num_kv_heads or a.num_heads
    if model.kind == "encoder_decoder":
        model.encoder_layers = model.encoder_layers or model.num_layers
    patches = (model.vision.image_size // model.vision.patch_size) ** 2 + model.vision.class_token
    model.max_length = model.max_length or (patches if model.kind == "vit" else config.data.sequence_length)
    model.ffn.hidden = model.ffn.hidden or _ffn_width(model, specs)
    _derive_outputs(config, specs, vocab_size, num_classes)


def _ffn_width(model: ModelConfig, specs: dict[str, Any]) -> int:
    spec = specs["activation"]
    return ffn_width(model.d_model, gated=spec.gated or spec.halves, match=model.ffn.match, bias=model.ffn.bias)


def _derive_outputs(config: ExperimentConfig, specs: dict[str, Any], vocab_size: int | None, num_classes: int | None) -> None:
    """What the head predicts; stays 0 where only the data tells and has not been opened."""
    model, source = config.model, specs["source"]
    if model.kind != "vit":
        needed = vocab_size or _declared_vocab_size(specs, config.data.sequence_length) or 0
        model.vocab_size = model.vocab_size or needed
        check(model.vocab_size >= needed, "model.vocab_size", model.vocab_size,
              f"the {'symbols of ' + config.data.source if source.content == 'symbols' else 'tokenizer'} needs {needed}")
    else:
        check(not model.vocab_size, "model.vocab_size", model.vocab_size, "a vit reads no tokens")
    if config.data.task != "classification":
        check(not model.num_classes, "model.num_classes", model.num_classes, f"data.task is {config.data.task!r}")
        return
    found = num_classes or int(getattr(source, "num_classes", 0) or 0)
    model.num_classes = model.num_classes or found
    check(model.num_classes >= found, "model.num_classes", model.num_classes, f"{config.data.source} has {found}")


def _declared_vocab_size(specs: dict[str, Any], length: int) -> int | None:
    if specs["source"].content == "symbols":
        return specs["source"].vocab_size
    return specs["tokenizer"].declared_vocab_size(specs["task"].num_sentinels(length))
