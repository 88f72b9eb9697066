"""One folder knows DeepSpeed: the rest of training/ uses the interface, all of it, and no more."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from training import engine_interface
from training.engine_interface import Engine
from training.zero3.engine import Zero3Engine

ROOT = Path(engine_interface.__file__).parents[1]
ROOM = ROOT / "training" / "zero3"
OUTSIDE = [file for file in (ROOT / "training").rglob("*.py") if ROOM not in file.parents]

SETTINGS = {  # files that name the section of settings, and how
    "start/changes.py": '"deepspeed": HERE,',
    "bench/bench_workload.py": '"deepspeed": {"param_persistence_threshold": 0},',
    "gpu_record/speed_options.py": '"prefetch": ("deepspeed.prefetch=model",),',
}


def named(text: str) -> Iterator[str]:
    """The lines that name DeepSpeed, but for its launcher, under which any engine may run."""
    for line in re.sub(r"deepspeed launcher", "", text).splitlines():
        if "deepspeed" in line.lower():
            yield line.strip()


def members(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_no_other_file_names_deepspeed() -> None:
    found = {
        file.relative_to(ROOT): lines for file in OUTSIDE if (lines := [*named(file.read_text())])
    }
    settings = found.pop(Path("training/config.py"))
    for file, line in SETTINGS.items():
        assert found.pop(Path("training") / file) == [line]
    assert not found
    ours = ("DeepSpeedSettings", "`extra`", "offload_optimizer")
    assert all(any(name in line for name in ours) for line in settings)


def test_only_what_the_interface_lists_is_imported_from_the_folder() -> None:
    imported = {
        f"{node.module}.{alias.name}".removeprefix("training.zero3.")
        for file in OUTSIDE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training.zero3")
        for alias in node.names
    }
    listed = re.findall(r"^    ([\w.]+) {2,}\w", engine_interface.__doc__ or "", re.MULTILINE)
    assert imported == set(listed)


def test_the_folder_imports_only_what_lies_below_it() -> None:
    imported = {
        node.module.split(".")[1]
        for file in ROOM.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training.")
    }
    below = {
        "adapters",
        "config",
        "distributed",
        "engine_interface",
        "model",
        "optimizers",
        "parameters",
        "speed",
    }
    assert imported == {"zero3", *below}


def test_the_rest_uses_the_whole_interface_and_nothing_beside_it() -> None:
    used = {
        node.attr
        for file in OUTSIDE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "engine"
    }
    assert used == members(Engine)


def test_the_engine_has_the_interface() -> None:
    assert members(Engine) <= members(Zero3Engine)
