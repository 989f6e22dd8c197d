"""The device mesh: sizes per axis; -1 in one axis takes the devices that are left."""

from dataclasses import dataclass


@dataclass
class MeshConfig:
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1
    allow_replicated: bool = False  # do not refuse parameters above 64 Ki elements that no axis shards although one could
