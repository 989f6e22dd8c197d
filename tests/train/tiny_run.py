"""The config of the end-to-end tests: a run of seconds, and faults that it can be given: `tests/train/tiny_run.py:FAULT`."""

import os
import signal
import time

from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.train import checkpoint_files, metrics
from sparsejax.train.config import CheckpointConfig, EvaluateConfig, LogConfig, OptimizerConfig


def killed() -> None:
    """Steps take some milliseconds longer, and the eleventh waits: the process is met in the middle of its run."""
    fetch = metrics.fetch

    def late(tree):
        time.sleep(0.03 if tree["data_index"] < 10 else 600)
        return fetch(tree)

    metrics.fetch = late


def killed_while_saving() -> None:
    """The second checkpoint's files are written, its manifest is not, when the process is gone."""
    seal, sealed = checkpoint_files.seal, []

    def kill_at_the_second(folder):
        if sealed:
            os.kill(os.getpid(), signal.SIGKILL)
        sealed.append(folder)
        seal(folder)

    checkpoint_files.seal = kill_at_the_second


def terminated() -> None:
    """SIGTERM arrives while the fifth step's metrics are fetched, when the sixth has been dispatched."""
    fetch = metrics.fetch

    def interrupted(tree):
        if tree["data_index"] == 4:
            metrics.fetch = fetch
            signal.raise_signal(signal.SIGTERM)
        return fetch(tree)

    metrics.fetch = interrupted


FAULTS = {"": lambda: None, "terminated": terminated, "killed": killed, "killed_while_saving": killed_while_saving}


def get_config(arg: str = "") -> ExperimentConfig:
    FAULTS[arg]()
    return ExperimentConfig(
        name="tiny",
        steps=12,
        batch_size=8,
        model=ModelConfig(num_layers=1, d_model=16, attention=AttentionConfig(num_heads=2), ffn=FFNConfig(hidden=32)),
        data=DataConfig(source="copy", sequence_length=16),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=4),
        log=LogConfig(every=1, writers=("jsonl",)),
        evaluate=EvaluateConfig(batches=2),
    )
