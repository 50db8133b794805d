"""The tree keeps its promises: one name per idea in every folder, imports that run one way."""

import ast
import re
from pathlib import Path

import pytest

from llmos_fast import ops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmos_fast"


def imports_of(path):
    """Names of the modules that a file imports from this package."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("llmos_fast")}


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_has_its_row(op):
    assert (PACKAGE / "ops" / f"{op}.py").exists()
    assert (PACKAGE / "reference" / f"{op}.py").exists()
    tested = "".join(p.read_text() for p in (ROOT / "tests" / "ops").glob("test_*.py"))
    timed = "".join(p.read_text() for p in (ROOT / "benchmarks").glob("bench_*.py"))
    assert f"ops.{op}" in tested
    assert f"ops.{op}" in timed


# a folder and what its files may not import
FORBIDDEN = {
    "checkpoints": ("native", "kernels", "nn", "models", "data", "training", "generation"),
    "data": ("native", "kernels", "nn", "models", "training", "generation"),
    "reference": ("native", "kernels", "nn", "models", "training", "generation"),
    "native": ("kernels", "nn", "models", "training", "generation"),
    "ops": ("native", "kernels", "nn", "models", "training", "generation"),
    "nn": ("native", "kernels", "models", "training", "generation", "dispatch"),
    "models": ("native", "kernels", "training", "generation", "dispatch"),
    "integrations": ("native", "kernels", "nn", "models", "training", "generation"),
    "compat": ("native", "kernels", "nn", "models", "training", "generation", "dispatch"),
}


def test_gpu_kernels_import_neither_layers_nor_other_implementations():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports_of(path):
            target = name.split(".")[1] if "." in name else ""
            assert target not in ("native", "nn", "models", "training", "generation"), path.name


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_run_one_way(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        for name in imports_of(path):
            target = name.split(".")[1] if "." in name else ""
            assert target not in FORBIDDEN[folder], f"{path.name} imports {name}"


def test_native_sources_know_no_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path.name


def test_kernels_is_not_a_top_level_module():
    source = (ROOT / "kernels" / "__init__.py").read_text()
    with pytest.raises(ImportError, match=r"llmos_fast\.kernels"):
        exec(compile(source, "kernels", "exec"), {"__name__": "kernels"})


def test_no_pickle():
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        assert not re.search(r"\bpickle\b.*\bload|torch\.load\(", path.read_text()), path.name
