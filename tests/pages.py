"""The pages for readers: their commands, and a copy of the repository to run them in."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)
MAKE = f"make -o {sys.prefix}/installed VENV={sys.prefix}"


def prose(*pages: Path) -> str:
    """The text of pages (of all, if none is given) with every run of white space as one space."""
    return " ".join(" ".join(page.read_text() for page in pages or PAGES).split())


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, continued ones joined, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s+", "", block).splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def copy_repository(root: Path) -> None:
    """Copy what git would track to the folder `root`."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)


def run_command(command: str, root: Path, **environment: str) -> str:
    """What a command prints that must succeed in `root`, without a GPU or a network."""
    result = subprocess.run(
        shlex.split(command),
        cwd=root,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "TRITON_INTERPRET": "0",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
