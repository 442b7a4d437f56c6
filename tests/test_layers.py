"""An arrow may only point down: walks every import of `interp/` and `kernels/` and names the ones that do not.

The layers are those of the design, lowest last. A package below may be imported by one above, never the other way
round; methods never import each other; the core stays importable without the libraries of the field.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("cli",),
    ("report",),
    ("analyses", "circuits", "steering"),
    ("dictionaries",),
    ("tasks",),
    ("instrument",),
    ("models",),
    ("core",),
    ("kernels",),
)
"""Packages of `interp`, highest first; those of one row do not import each other's methods."""
LEVEL = {package: -level for level, row in enumerate(LAYERS) for package in row}
METHODS = ("analyses", "circuits", "steering")
CORE_MAY = {"torch", "numpy", "pandas", "safetensors", "jaxtyping"}
KERNELS_MAY = {"torch", "triton"}
MAY_USE_KERNELS = ("dictionaries",)
FRONT = "interp"
"""`interp/__init__.py` may name anything, since it imports it when asked; what it imports at once is tested below."""
TOP = (FRONT, "interp.__main__")


@dataclass(frozen=True)
class Import:
    """One import of one module."""

    module: str
    """Who imports, e.g. `interp.core.run`."""
    target: str
    line: int
    lazy: bool
    """Inside a function, or for the type checker only."""
    typing_only: bool


def sources(root: Path) -> dict[str, ast.Module]:
    """Module name -> syntax tree, of `interp/` and of `kernels/` under the name that Python knows it by."""
    found: dict[str, ast.Module] = {}
    for folder in ("interp", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            name = ".".join(("interp", *parts) if folder == "kernels" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports_of(module: str, tree: ast.Module, known: set[str]) -> Iterator[Import]:
    """Every import statement, and every `import_module("...")` with a constant name."""

    def walk(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, lazy or typing_only, typing_only)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno} imports relatively"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    target = full if full in known else str(child.module)
                    yield Import(module, target, child.lineno, lazy or typing_only, typing_only)
            elif (
                isinstance(child, ast.Call)
                and ast.unparse(child.func).endswith(("import_module", "__import__"))
                and child.args
                and isinstance(child.args[0], ast.Constant)
            ):
                yield Import(module, str(child.args[0].value), child.lineno, lazy, typing_only)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), lazy, True)
                for statement in child.orelse:
                    yield from walk(ast.Module([statement], []), lazy, typing_only)
            else:
                yield from walk(child, lazy or inside, typing_only)

    yield from walk(tree, False, False)


def is_method(tree: ast.Module) -> bool:
    """Whether the file ends in a SPEC."""
    names = [
        target.id
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    ]
    return "SPEC" in names


def package_of(module: str) -> str | None:
    """`interp.core.run` -> `core`; None for another distribution and for the front page."""
    parts = module.split(".")
    return parts[1] if parts[0] == "interp" and len(parts) > 1 else None


def complaint(found: Import, methods: set[str]) -> str | None:
    """Why an import is not allowed, or None."""
    here, there = package_of(found.module), package_of(found.target)
    outside = found.target.split(".")[0]
    if outside == "kernels":
        return "kernels is another distribution; ours is interp.kernels"
    if here is None or found.module in TOP:
        return None
    if here not in LEVEL:
        return f"the package {here} has no layer; add it to tests/test_layers.py"
    if outside != "interp":
        allowed = {"core": CORE_MAY, "kernels": KERNELS_MAY}.get(here)
        if allowed is not None and outside not in allowed | set(sys.stdlib_module_names):
            return f"{here} imports only {', '.join(sorted(allowed))}"
        return None
    if there is None:
        return "the front page is for users; import the module itself"
    if there == "kernels" and here not in ("kernels", *MAY_USE_KERNELS):
        return f"only {', '.join(MAY_USE_KERNELS)} may use the kernels"
    if here == "kernels" and there != "kernels":
        return "kernels import torch and triton only"
    if there in LEVEL and LEVEL[there] > LEVEL[here]:
        return f"{here} lies below {there}"
    if here in METHODS and found.target in methods and found.target != found.module:
        return "methods never import each other; move what they share to a file without a SPEC"
    return None


def complaints(root: Path) -> list[str]:
    """Every import that is not allowed, as `module:line imports target: why`."""
    trees = sources(root)
    methods = {name for name, tree in trees.items() if package_of(name) in METHODS and is_method(tree)}
    return [
        f"{found.module}:{found.line} imports {found.target}: {why}"
        for name, tree in trees.items()
        for found in imports_of(name, tree, set(trees))
        if (why := complaint(found, methods))
    ]


def test_every_arrow_points_down() -> None:
    assert complaints(ROOT) == []


def test_the_walk_sees_the_package() -> None:
    """Guards the test above against passing because it looked at nothing."""
    trees = sources(ROOT)
    assert {"interp", "interp.core.run", "interp.models.load", "interp.kernels"} <= set(trees)
    assert any(name.startswith("interp.kernels.") for name in trees)
    seen = {found.target for found in imports_of("interp.core.run", trees["interp.core.run"], set(trees))}
    assert {"interp.core.result", "safetensors.torch", "pandas"} <= seen


PLANTED = {
    "core imports the models": ("interp/core/bad.py", "from interp.models import load", "core lies below models"),
    "late, inside a function": (
        "interp/models/bad.py",
        "def f():\n    import interp.instrument.capture",
        "models lies below instrument",
    ),
    "by name": (
        "interp/tasks/bad.py",
        "import importlib\nx = importlib.import_module('interp.cli')",
        "tasks lies below cli",
    ),
    "for types only": (
        "interp/core/bad.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from interp.report import html",
        "core lies below report",
    ),
    "the core imports a heavy library": ("interp/core/bad.py", "import transformers", "core imports only"),
    "the core imports scipy": ("interp/core/bad.py", "def f():\n    from scipy import stats", "core imports only"),
    "a kernel imports numpy": ("kernels/bad.py", "import numpy as np", "kernels imports only"),
    "a kernel imports the core": ("kernels/bad.py", "from interp.core import errors", "torch and triton only"),
    "a method uses a kernel": ("interp/analyses/bad.py", "from interp.kernels import topk", "may use the kernels"),
    "a method imports a method": ("interp/analyses/bad.py", "from interp.steering.one import x", "never import each"),
    "the front page": ("interp/models/bad.py", "import interp", "front page"),
    "a new package": ("interp/extra/bad.py", "import interp.core.run", "has no layer"),
    "somebody else's kernels": ("interp/dictionaries/bad.py", "import kernels", "another distribution"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_arrow_is_caught(tmp_path: Path, case: str) -> None:
    where, code, why = PLANTED[case]
    for path, text in {"interp/steering/one.py": "x = 1\nSPEC = x", where: code}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "interp" / "models").mkdir(exist_ok=True)
    found = complaints(tmp_path)
    assert len(found) == 1, found
    assert why in found[0]


def test_allowed_arrows_pass(tmp_path: Path) -> None:
    allowed = {
        "interp/__init__.py": "def load():\n    from interp.cli import main",
        "interp/cli/a.py": "from interp.report import html\nimport interp.core.run\nimport typer",
        "interp/analyses/a.py": "from interp.steering.shared import x\nfrom interp.models import load\nSPEC = 1",
        "interp/steering/shared.py": "x = 1",
        "interp/dictionaries/a.py": "from interp.kernels import topk",
        "interp/core/a.py": "import json, torch\nimport numpy as np\nfrom jaxtyping import Float",
        "kernels/topk.py": "import triton.language as tl\nfrom interp.kernels import other",
    }
    for path, text in allowed.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert complaints(tmp_path) == []


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


BLOCKED = ("transformer_lens", "sae_lens", "plotly", "matplotlib", "transformers", "sklearn", "typer", "rich", "gguf")

LIGHT = f"""
import sys
blocked = {BLOCKED!r}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
import interp
assert not [name for name in sys.modules if name.split(".")[0] in blocked]
names = dir(interp)
assert "load" in names and "capture" in names, names
from interp.core import controls, hash, manifest, progress, result, run, seed, sites, spec
print(interp.Site(interp.core.sites.Part.Z, 3), interp.capture.__name__, interp.edits.__name__)
"""


def test_import_works_without_the_libraries_of_the_field() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["z.3", "capture", "interp.instrument.edits"]


def test_import_loads_nothing_heavy() -> None:
    """`import interp` alone; torch too waits until a name is asked for."""
    code = "import sys, interp; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "interp" in loaded
    assert not loaded & {*BLOCKED, "torch", "pandas", "triton", "datasets", "wandb"}
