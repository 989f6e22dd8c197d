"""Eight simulated CPU devices, strict rank promotion, deterministic hypothesis.

Tests compile many tiny programs once each: XLA's optimizer is switched off, which takes two thirds off the suite's time.
The tests of a file run in one process, where what they compile is there for all of them; the longest files come first, so that
no process is left to work alone at the end.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Runs that are repeated (straight and resumed, one process and two) compile the same programs again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="sparsejax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("ci")

LONGEST_FIRST = ("test_run.py", "test_finetune.py", "test_moe.py", "test_everything.py", "test_cache.py", "test_step.py",
                 "test_transformer.py", "test_sequence_sets.py", "test_multi_process.py", "test_session.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
