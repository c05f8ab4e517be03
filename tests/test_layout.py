"""Checks that folders, import contract and the table in docs/design.md agree."""

import ast
import graphlib
import re
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qlora_jax"


def folders() -> set[str]:
    return {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def layers() -> list[set[str]]:
    """Returns the contract's layers, lowest first; a set holds independent siblings."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    (contract,) = tools["importlinter"]["contracts"]
    assert contract["exhaustive"]
    return [set(layer.split(" | ")) for layer in reversed(contract["layers"])]


def table() -> list[str]:
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    return re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, re.MULTILINE)


MODULES = {"__main__", "cli", "library"}


def test_the_root_holds_few_modules() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *MODULES}


def test_the_contract_names_every_folder() -> None:
    named = set().union(*layers())
    assert named == folders() | MODULES
    assert not [name for name in named if ":" in name]


def test_the_table_of_the_design_has_the_contracts_order() -> None:
    rank = {name: i for i, layer in enumerate(layers()) for name in layer}
    rows = table()
    assert set(rows) == folders() | {"library"}
    assert len(rows) == len(set(rows))
    assert [rank[name] for name in rows] == sorted(rank[name] for name in rows)


def test_every_folder_says_what_it_is() -> None:
    texts = {path: path.read_text("utf-8") for path in PACKAGE.rglob("__init__.py")}
    assert not [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("qlora_jax")
    found = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError, which names the cycle


def test_every_stop_of_the_walks_is_there() -> None:
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    walks = text.partition("## Three walks")[2].partition("## Decisions")[0]
    stops = re.findall(r"`([\w/]+\.py):(\w+)`", walks)
    assert len(stops) > 30
    for file, name in stops:
        body = ast.parse((PACKAGE / file).read_text("utf-8")).body
        assert name in {getattr(node, "name", "") for node in body}, f"{file}:{name}"
