import ast
import contextlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from qlora_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
OURS = {"qlora_jax", "experiments"}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def test_imports_go_one_way():
    """Runs import-linter; `tool.importlinter` in pyproject.toml lists the layers."""
    check = "from importlinter.cli import lint_imports_command as run; run()"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # the code for these two extras is imported only when it is used
    lines = [*project["dependencies"], *extras["harness"], *extras["judge"]]
    declared = {plain(re.match(r"[\w.-]+", line)[0]) for line in lines}
    files = list((ROOT / "qlora_jax").rglob("*.py"))
    peers = ROOT / "qlora_jax" / "bench" / "peers"  # other interpreters run these files
    ours = [file for file in files if peers not in file.parents]
    packages = {name.partition(".")[0] for file in ours for name in imported(file)}
    packages -= {*sys.stdlib_module_names, "qlora_jax"}
    assert {"jax", "pyarrow", "ruamel"} <= packages
    providers = importlib.metadata.packages_distributions()
    missing = {p for p in packages if not declared & {plain(d) for d in providers.get(p, [p])}}
    assert not missing


def imported_modules(nodes):
    """Returns this project's modules that a file imports by `from ... import`, by local name."""
    modules = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in OURS:
            for alias in node.names:
                with contextlib.suppress(ImportError, UserError):  # no module, or not for this jax
                    found = importlib.import_module(f"{node.module}.{alias.name}")
                    modules[alias.asname or alias.name] = found
    return modules


def stale_names(file):
    """Yields each `module.name` that a file reads and that the project's module does not have."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    modules = imported_modules(nodes)
    bound = {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    bound |= {x.arg for x in nodes if isinstance(x, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in modules.keys() - bound and not hasattr(modules[name], node.attr):
                yield f"{name}.{node.attr}"


def test_tests_read_names_that_exist():
    """Finds names that were renamed in the package, also in tests that are rarely run."""
    found = {str(f.relative_to(ROOT)): sorted(set(stale_names(f))) for f in TESTS}
    assert {name: names for name, names in found.items() if names} == {}
