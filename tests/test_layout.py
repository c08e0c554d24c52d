"""The layout is a contract: who may import whom, how big a file may grow, what a name may not say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("icmoe", "fl_client", "fl_server", "simulations")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
EVERYTHING = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]

FORBIDDEN = {
    "icmoe": {"flwr", "ray", "fl_client", "fl_server", "simulations"},
    "fl_client": {"fl_server", "simulations", "ray"},
    "fl_server": {"fl_client", "simulations", "ray"},
    "simulations": set(),
}
TOP_LEVEL = {
    *("fl_server", "fl_client", "icmoe", "deploy", "simulations", "tests", "pyproject.toml", "README.md"),
    *("LICENSE", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "Makefile"),
}


def imports_of(tree: ast.AST) -> set[str]:
    """Return the top-level packages that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_check_sees_imports_inside_functions() -> None:
    assert imports_of(ast.parse("def f():\n    from ray.util import x\n    import flwr.app as a\n")) == {"ray", "flwr"}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_import_rule(path: Path) -> None:
    assert not imports_of(tree_of(path)) & FORBIDDEN[path.relative_to(ROOT).parts[0]]


def test_icmoe_runs_where_flower_and_ray_are_not_installed() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "icmoe").rglob("*.py")]
    wanted = sorted(module for module in modules if not module.endswith("__main__"))
    block = "import sys; sys.modules.update(dict.fromkeys(['flwr', 'ray', 'fl_client', 'fl_server', 'simulations']))"
    code = f"{block}; import importlib; [importlib.import_module(m) for m in {wanted!r}]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("path", EVERYTHING, ids=named)
def test_files_fit_in_the_head(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 45, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_names_say_what_a_thing_is(path: Path) -> None:
    assert not re.search(r"(manager|handler|helper|util)", path.stem)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"(Manager|Handler|Helper|Utils?)$", node.name)


def test_inheritance_is_at_most_two_deep() -> None:
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef)
    }

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases.get(name, ()) if base in bases), default=0)

    assert {name for name in bases if depth(name) > 2} == set()


def test_every_package_is_installed() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(path.relative_to(ROOT).parent.parts) for path in SOURCES if path.name == "__init__.py"}
    assert set(named) == found


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / line for line in listed.splitlines()]


def test_top_level_holds_what_the_layout_says() -> None:
    tops = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {top for top in tops if not top.startswith(".")} <= TOP_LEVEL


def test_no_tracked_file_is_data_weights_or_large() -> None:
    for path in tracked():
        assert path.suffix not in {".dcm", ".nii", ".gz", ".pt", ".pth", ".safetensors", ".npy", ".npz"}, path
        assert path.stat().st_size < 1_000_000, path


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        assert not imports_of(tree_of(path)) & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), path


def test_one_module_takes_locks() -> None:
    assert [named(path) for path in SOURCES if "fcntl" in imports_of(tree_of(path))] == ["icmoe/locks.py"]


def test_no_script_says_what_is_wrong_with_its_command_line_in_words_of_typers_own() -> None:
    for path in SOURCES:
        assert "typer.run" not in {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}, path
