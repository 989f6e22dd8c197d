"""The house rules that a machine can check: imports, forbidden transforms, weight of an import, size of a file."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for folder in ("sparsejax", "experiments", "kernels_pallas", "configs") for p in (ROOT / folder).rglob("*.py")
)

# Lowest first; a package may import those before it and itself. The plain dataclasses of `*.config` stand below everything.
ORDER = [
    (
        "sparsejax.plugs",
        "sparsejax.nnx_compat",
        "sparsejax.config_text",
        "sparsejax.context",
        "sparsejax.data.config",
        "sparsejax.models.config",
        "sparsejax.parallel.config",
        "sparsejax.train.config",
    ),
    ("kernels_pallas",),
    ("sparsejax.ops.formats",),  # what a QTensor's codes mean
    ("sparsejax.sparse_arrays", "sparsejax.quantized_arrays", "sparsejax.quantized_rows", "sparsejax.arrays"),
    ("sparsejax.parallel",),
    ("sparsejax.ops",),
    ("sparsejax.layers",),
    ("sparsejax.models", "sparsejax.data", "sparsejax.io"),
    ("sparsejax.evaluate",),
    ("sparsejax.config_rules", "sparsejax.config"),
    ("sparsejax.train",),
    ("sparsejax.io.load",),  # --model may name a run as well as a published model
    ("sparsejax.methods", "sparsejax.compress"),
    ("configs",),
    ("experiments",),
]
# finalize checks a name against what exists, and train's optimizers and writers are among the names.
EXCEPTIONS = {("sparsejax.config_rules", "sparsejax.train")}


def level(module: str) -> int:
    ranks = [
        (len(name), rank)
        for rank, names in enumerate(ORDER)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(ranks)[1] if ranks else -1


def imports(path: Path) -> list[str]:
    """Modules of ours that a file imports at its top level."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [
                s
                for s in submodules
                if (ROOT / (s.replace(".", "/") + ".py")).exists() or (ROOT / s.replace(".", "/")).is_dir()
            ]
            found += files or [node.module]
    return [name for name in found if name.split(".")[0] in ("sparsejax", "experiments", "kernels_pallas", "configs")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for imported in imports(path):
        package = ".".join(imported.split(".")[:2])
        if (module, package) not in EXCEPTIONS:
            assert level(imported) <= level(module), f"{module} imports {imported}"


def test_kernels_import_jax_alone():
    for path in (ROOT / "kernels_pallas").rglob("*.py"):
        assert all(name.startswith("kernels_pallas") for name in imports(path)), path


def test_no_flax_transform_is_used():
    pattern = re.compile(r"nnx\.(jit|grad|value_and_grad|scan|remat|vmap|pmap|Optimizer|sow)\b|\.sow\(|flax\.linen")
    hits = [f"{p.relative_to(ROOT)}: {m[0]}" for p in SOURCES for m in pattern.finditer(p.read_text())]
    assert hits == []


def test_flax_is_touched_in_one_file():
    users = [p.relative_to(ROOT).as_posix() for p in SOURCES if re.search(r"^(from|import) flax", p.read_text(), re.M)]
    assert users == ["sparsejax/nnx_compat.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 600


def test_importing_sparsejax_touches_no_device_and_no_other_framework():
    code = (
        "import sys, sparsejax, sparsejax.config, sparsejax.models.transformer, sparsejax.train.run\n"
        "import jax\n"
        "assert not jax._src.xla_bridge.backends_are_initialized()\n"
        "loaded = {'tensorflow', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_transformer_knows_no_method_by_name():
    text = (ROOT / "sparsejax/models/transformer.py").read_text() + (ROOT / "sparsejax/layers/block.py").read_text()
    found = re.findall(r"top_?k|int8|int4|quant|moe|expert|router|l1|prosparse|ul2", text, re.I)
    assert found == []
