"""How a model is trained, saved, logged and evaluated."""

from dataclasses import dataclass


@dataclass
class OptimizerConfig:
    name: str = "adamw"  # any optimizer of optax by name
    arguments: str = ""  # further keyword arguments of the optax function: "b2=0.95,eps=1e-9"
    learning_rate: float = 2e-3
    schedule: str = "cosine"  # constant | cosine | wsd | inverse_sqrt
    warmup_steps: int = 0
    decay_fraction: float = 0.2  # wsd: share of all steps spent decaying
    final_fraction: float = 0.1  # learning rate at the end, as a share of the peak (cosine, wsd)
    weight_decay: float = 0.01  # applied to the roles in decay_roles only
    decay_roles: tuple[str, ...] = ("matrix", "embedding")
    clip_norm: float = 1.0  # global gradient norm; 0: off
    ema_decay: float = 0.0  # average of the weights used for evaluation; 0: off
    train: tuple[str, ...] = ()  # roles ("adapter") or globs of parameters ("blocks.*.mlp.**"), the rest is frozen; (): all


@dataclass
class CheckpointConfig:
    every: int = 0  # steps; 0: only at the end
    keep: int = 2
    on_nan: str = "stop"  # stop | skip | rollback
    spike_factor: float = 0.0  # loss above this multiple of its EMA counts as a spike; 0: off


@dataclass
class LogConfig:
    every: int = 10  # steps between lines
    watch_every: int = 0  # steps between watching steps; 0: never
    writers: tuple[str, ...] = ("csv", "jsonl", "tensorboard")  # also: wandb
    peak_flops: float = 0.0  # per device, for MFU; 0: from the table of known devices, nan if unknown


@dataclass
class EvaluateConfig:
    every: int = 0  # steps; 0: only at the end
    batches: int = 16
    corruptions: tuple[str, ...] = ()  # registry kind "corruption": at the end, images are evaluated under each as well
    sample_tokens: int = 0  # characters of text generated at the end; 0: none
    sample_prompt: str = ""
