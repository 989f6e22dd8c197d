"""Eight simulated CPU devices, strict rank promotion, deterministic hypothesis (HYPOTHESIS_PROFILE=full draws more, at random).

Tests compile many tiny programs once each, which is most of what they cost: XLA's optimizer is switched off (two thirds off the
suite's time), and compiled programs are kept between runs (half of the rest, from the second run on). A run with an empty
JAX_COMPILATION_CACHE_DIR compiles everything. The tests of a file run in one process, where what they compile is there for all
of them; the longest files come first, so that no process is left to work alone at the end.
"""

import atexit
import gc
import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

CACHE_LIMIT = 2**30  # bytes; a run writes about a tenth


def compiled_programs() -> str:
    """The folder of compiled programs, named by jax for their text, its options and version; emptied when it has grown."""
    cpu = Path("/proc/cpuinfo")  # what the processor can do is not in jax's names
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    machine = hashlib.sha256(repr((platform.machine(), features)).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsejax-tests" / machine
    try:
        if folder.exists() and sum(entry.stat().st_size for entry in os.scandir(folder)) > CACHE_LIMIT:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="sparsejax-tests-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # set for the workers by the process that starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled_programs()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=12)
hypothesis.settings.register_profile("full", deadline=None, max_examples=100)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

LONGEST_FIRST = ("test_run.py", "test_finetune.py", "test_moe.py", "test_everything.py", "test_cache.py", "test_step.py",
                 "test_attend.py", "test_transformer.py", "test_shipped_configs.py", "test_sequence_sets.py",
                 "test_multi_process.py", "test_session.py", "test_gptq.py")  # fmt: skip


def pytest_collection_finish(session):
    # What was imported stays; collecting it again and again, at every few hundred new objects, takes a twentieth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
