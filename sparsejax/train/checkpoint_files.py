"""What makes a folder a checkpoint: written under another name, sealed by a manifest, renamed last.

    checkpoints/40/            complete: manifest.json names every other file with its size and sha256
    checkpoints/60.saving/     being written, or left by a process that was killed
    checkpoints/20.deleting/   on its way out
    checkpoints/50.superseded/ complete, but of a history that the run left when it resumed from before it

Nothing here knows what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparsejax.plugs import ConfigError

MANIFEST = "manifest.json"
SAVING, DELETING, SUPERSEDED = ".saving", ".deleting", ".superseded"
_HASHING_THREADS = 4


class CheckpointError(ConfigError):
    """A checkpoint that was asked for cannot be used, or one could not be written; the message names the folder."""


def steps(folder: Path) -> list[int]:
    """Steps that have a finished folder (sealed or damaged), ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())


def leftovers(folder: Path) -> list[Path]:
    """Folders that a killed process left half-written or half-deleted."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.suffix in (SAVING, DELETING) and entry.stem.isdecimal())


def read_json(path: Path) -> Any:
    """The JSON value of a file.

    Raises:
      CheckpointError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def seal(folder: Path) -> None:
    """Bring every file of the folder to the disk, then write the manifest that makes it count."""
    paths = _files(folder)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = list(pool.map(_digest_synced, paths))
    files = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
             for path, digest in zip(paths, digests, strict=True)}
    for directory in {path.parent for path in paths}:
        _sync_folder(directory)
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"files": files, "sha256": _self_digest(files)}, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def damage(folder: Path) -> str | None:
    """Why a folder is not a good checkpoint, by file; None when every byte is as it was written."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / MANIFEST).is_file():
        return f"unfinished: it has no {MANIFEST}"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if manifest["sha256"] != _self_digest(files):
            return f"{MANIFEST} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = list(pool.map(lambda item: _file_damage(folder / item[0], item[1]), files.items()))
    problems = [f"{name} {problem}" for name, problem in zip(files, found, strict=True) if problem]
    more = f" and {len(problems) - 3} more files" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more if problems else None


def _file_damage(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes instead of {expected['bytes']}"
        return None if _digest(path) == expected["sha256"] else "has changed since it was written (sha256 differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def publish(saving: Path, step: int) -> Path:
    """Rename a sealed `.saving` folder to its step; what had that step before is kept as superseded."""
    final = saving.parent / str(step)
    if final.exists():
        set_aside(final)
    os.rename(saving, final)
    _sync_folder(saving.parent)
    return final


def adopt(folder: Path) -> list[int]:
    """Publish saves that were sealed but not yet renamed when their process was killed; returns their steps."""
    adopted = []
    for left in leftovers(folder):
        step = int(left.stem)
        if left.suffix == SAVING and step not in steps(folder) and damage(left) is None:
            publish(left, step)
            adopted.append(step)
    return adopted


def set_aside(final: Path) -> Path:
    """Rename a finished folder so that it no longer counts, without losing it."""
    aside = final.with_name(final.name + SUPERSEDED)
    if aside.exists():
        remove(aside)
    os.rename(final, aside)
    return aside


def remove(folder: Path) -> None:
    """Delete a folder; killed in between, it leaves no folder that looks like a damaged checkpoint."""
    doomed = folder.with_name(folder.name.split(".")[0] + DELETING)
    if folder != doomed:
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> list[str]:
    """Delete what killed processes left; returns the names."""
    swept = leftovers(folder)
    for left in swept:
        remove(left)
    return [left.name for left in swept]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_synced(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _self_digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
