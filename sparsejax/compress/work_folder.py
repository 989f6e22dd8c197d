"""The folder of a compression while it is under way and when it is done.

    work/KEY/   in DIR: finished pieces; KEY is a hash of model, recipe and calibration, so a change of these reuses nothing
    work/done/  in DIR: the result while it is written
    DIR         the result: complete when it has `model.json`, which is moved there last; `work` is then removed
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax import nnx_compat
from sparsejax.io import model_json
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError, check

WORK = "work"


def fingerprint(model: Model) -> str:
    """A hash of a model's config and parameters."""
    found = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for path in model.structure.paths:
        for leaf in jax.tree.leaves(nnx_compat.at(model.values, path)):
            found.update(".".join(path).encode())
            found.update(np.ascontiguousarray(jax.device_get(leaf)).view(np.uint8).data)
    return found.hexdigest()


def key_of(**parts: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_out(out: Path, request: dict[str, Any]) -> bool:
    """Whether a folder holds the finished result of this very request; nothing is written.

    Raises:
      ConfigError: it holds another result or other files, or cannot be written.
    """
    if (out / model_json.MODEL_JSON).exists():
        found = model_json.read(out).source.get("compression", {}).get("request", {})
        differing = sorted(name for name in {*found, *request} if found.get(name) != request.get(name))
        rule = f"holds another result, differing in {', '.join(differing)}; give another folder"
        check(not differing, "--out", str(out), rule)
        return True
    if out.is_dir():
        foreign = not (out / WORK).is_dir() and any(out.iterdir())
        check(not foreign, "--out", str(out), "is not empty, and no compression is under way there")
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    check(parent.is_dir() and os.access(parent, os.W_OK), "--out", str(out), f"{parent} is not a folder that can be written")
    return False


class WorkFolder:
    """Pieces of one compression, kept until it is finished."""

    def __init__(self, out: Path, key: str, *, resume: bool = True):
        """Make the folder; pieces of another key, or all where they are not to be resumed, are removed.

        Raises:
          ConfigError: it cannot be made.
        """
        self.out, self.pieces = out, out / WORK / key
        try:
            self.pieces.mkdir(parents=True, exist_ok=True)
            for other in (out / WORK).iterdir():
                if other != self.pieces or not resume:
                    shutil.rmtree(other)
            self.pieces.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out = {str(out)!r}: not usable as a folder ({error})") from error
        self.resumed = any(self.pieces.iterdir())

    def kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """JSON values that were computed before, else computed and kept; numbers that JSON lacks (nan) survive."""
        path = self.pieces / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(compute())
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
        return json.loads(text)

    def finish(self, write: Callable[[Path], None]) -> None:
        """Have the result written into an empty folder, then move it into place, `model.json` last.

        Raises:
          ConfigError: the disk is full or not writable; the pieces are still there.
        """
        done = self.out / WORK / "done"
        try:
            done.mkdir()
            write(done)
            names = sorted((path.name for path in done.iterdir()), key=lambda name: (name == model_json.MODEL_JSON, name))
            for name in names:
                os.replace(done / name, self.out / name)
        except OSError as error:
            raise ConfigError(f"--out = {str(self.out)!r}: cannot be written ({error}); run it again to go on") from error
        finally:
            shutil.rmtree(done, ignore_errors=True)
        shutil.rmtree(self.out / WORK)
