"""The structure of the packages, read off their imports: one direction, no circle, unique names."""

import ast
from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_pipeline", "kernels", "training")
# What each package may import of the others.
MAY_IMPORT = {
    "data_pipeline": set[str](),
    "kernels": set[str](),
    "training": {"data_pipeline", "kernels"},
}
# The files and folders of data_pipeline from the ground up: each imports what stands before it.
DATA_PIPELINE = (
    *(
        "errors",
        "files",
        "machine",
        "text_table",
        "plotting",
        "html_page",
        "yaml_text",
        "paths",
        "pretrained_source",
        "cli",
    ),
    *("config_file", "backbone_config", "backbone_folder", "draw"),
    *("walk", "processor", "media_claims", "tokenizer", "captions"),
    *(
        "tiling",
        "native_settings",
        "images",
        "image_header",
        "records",
        "decode",
        "chat",
        "storage",
        "index",
        "mixture",
        "balance",
        "plan",
    ),
    *("loss_weighting", "batch", "loader", "settings", "corpus"),
    *("prepare", "stats", "inspect", "bench"),
)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> the modules of the packages that it imports, wherever in the file."""
    known = modules()
    found = {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = set(_imported(ast.parse(path.read_text(encoding="utf-8")), package, known))
        found[name] = frozenset((targets & known.keys()) - {name})
    return found


def _imported(tree: ast.AST, package: str, known: Container[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:  # of a package: a module of it, or what its face gives
                inner = f"{base}.{alias.name}"
                yield inner if inner in known else base


def circles(edges: dict[str, frozenset[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components above one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def test_packages_import_in_one_direction() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if (own := name.partition(".")[0]) != (other := target.partition(".")[0])
        and other not in MAY_IMPORT[own]
    ]
    assert not wrong


def test_nothing_in_the_data_pipeline_imports_upwards() -> None:
    floor = {name: number for number, name in enumerate(DATA_PIPELINE)}
    wrong = []
    for name, targets in imports().items():
        for target in targets:
            own, other = (m.split(".")[1:2] for m in (name, target))
            inside = name.startswith("data_pipeline.") and own and other
            if inside and floor[other[0]] > floor[own[0]]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_every_part_of_the_data_pipeline_has_its_floor() -> None:
    found = {name.split(".")[1] for name in modules() if name.startswith("data_pipeline.")}
    assert found <= set(DATA_PIPELINE)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not circles(imports())


def test_no_folders_of_training_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = defaultdict(set)
    for name, targets in imports().items():
        for target in targets:
            own, other = (".".join(m.split(".")[:2]) for m in (name, target))
            if own != other and own.startswith("training.") and other.startswith("training."):
                edges[own].add(other)
    assert not circles({name: frozenset(targets) for name, targets in edges.items()})


def test_a_circle_is_found() -> None:
    edges = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b"), "d": frozenset("a")}
    assert circles(edges) == [["b", "c"]]


@pytest.mark.parametrize("kind", ["file", "class"])
def test_a_name_is_given_once(kind: str) -> None:
    names: Counter[str] = Counter()
    for path in modules().values():
        if path.is_symlink():
            continue  # the same file, for a folder that is exported on its own
        if kind == "file" and path.name not in ("__init__.py", "__main__.py"):
            names[path.name] += 1
        elif kind == "class":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names.update(node.name for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_few_files_lie_loose_in_training() -> None:
    assert len(list((ROOT / "training").glob("*.py"))) <= 10


def test_every_folder_says_what_it_is_for() -> None:
    for path in modules().values():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
