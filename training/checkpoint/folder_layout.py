"""What a checkpoint folder looks like: names, the manifest, what is finished.

`DIR/step-00000100/` holds the engine's shards and `manifest.json`, which is written last;
`DIR/latest` names the newest, for people: finished folders decide. `DIR/tmp-...` is being written
or removed and never read; `DIR/bad-step-...` is a damaged checkpoint that a resume set aside.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import move_into_place, write_atomically
from training.adapters import StageAdapters

TEMPORARY = "tmp-"
BAD = "bad-"
MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: `files` maps a name to `{"bytes": n, "sha256": hex}`.

    `frozen` maps a frozen parameter's name to the sha256 of its bytes. `run` says of the run that
    saved it its "settings", its "origin" and its "schedule", the "vocab_size" of its tokenizer, and
    the ids of the "new_tokens" whose rows train; older versions wrote none of them.
    """

    step: int
    plan: dict[str, Any]
    world_size: int
    fingerprints: dict[str, Any]
    files: dict[str, dict[str, Any]]
    frozen: dict[str, str]
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def adapters(self) -> StageAdapters:
        """Those that it was saved with, as far as its state depends on their settings."""
        return StageAdapters.model_validate(self.fingerprints.get("train.adapters", {}))

    @property
    def total_bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())

    def to_json(self) -> bytes:
        fields = {"format": FORMAT, **asdict(self)}
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode()


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def manifest_hash(path: Path) -> str:
    """Equal for copies of a checkpoint only: its manifest holds the hashes of all files."""
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        InputError: if it is missing, damaged, or not of the folder it lies in.
    """
    file = path / MANIFEST
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        checksum, version = fields.pop("checksum"), fields.pop("format")
        whole = checksum == _checksum({"format": version, **fields})
        manifest = Manifest(**fields) if whole and version == FORMAT else None
    except NotADirectoryError:
        raise InputError(f"{path} is a file, no checkpoint{_named_in(path)}") from None
    except FileNotFoundError:
        if not path.exists():
            raise InputError(f"{path} does not exist") from None
        raise InputError(f"{file} is missing, so {path.name} {_unfinished(path)}") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{file} cannot be read: {error!r}") from error
    if not whole:
        raise InputError(f"{file} is damaged: its content does not have the checksum it names")
    if manifest is None:
        raise InputError(f"{file} has format {version}; this version reads {FORMAT}")
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{file} names {name!r}, which lies outside the checkpoint")
    if path.name.startswith("step-") and path.name != step_name(manifest.step):
        raise InputError(f"{file} is of step {manifest.step}, not of {path.name}")
    return manifest


def step_name(step: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    return int(path.name.removeprefix("step-"))


def _unfinished(path: Path) -> str:
    """What a folder without a manifest is."""
    if re.fullmatch(r"step-\d+", path.name):
        return "was never finished"
    if (path / "config.json").is_file():
        return "is not a checkpoint but a model, which model.pretrained takes"
    inside = checkpoints_at(path)
    return f"is not a checkpoint, as {inside[0]} is" if inside else "is not a checkpoint"


def _named_in(path: Path) -> str:
    """What the file `latest` means to say."""
    return f"; it names {path.read_text(errors='replace').strip()}" if path.name == LATEST else ""


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or the finished ones of a folder or run, newest first."""
    if (path / MANIFEST).is_file():
        return [path]
    return (finished(path) or finished(path / "checkpoints"))[::-1]


def candidates(folder: Path) -> list[Path]:
    """All `step-*` folders, oldest first, whether finished or not."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def finished(folder: Path) -> list[Path]:
    """The checkpoints of a folder that have a manifest, oldest first."""
    return [path for path in candidates(folder) if (path / MANIFEST).is_file()]


def refuse_inside(output_dir: Path) -> None:
    """InputError if a run is to lie among the checkpoints of another, or inside of one."""
    own = output_dir.resolve()
    for path in (own, *own.parents):
        in_one = re.fullmatch(r"step-\d+", path.name) and (path / MANIFEST).is_file()
        if in_one or (path.name == "checkpoints" and finished(path)):
            run = path.parent.parent if in_one else path.parent
            raise InputError(
                f"output_dir={output_dir} lies in {path}, which another run saved and may remove; "
                f"to go on with that run set output_dir={run}, or to start from its weights "
                f"checkpoint.init_from={path} and another output_dir"
            )


def remove(path: Path) -> None:
    """Delete a checkpoint; a kill half-way leaves a temporary folder, never half a checkpoint."""
    doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that pruning and later resumes do not count it."""
    aside = path.with_name(BAD + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def leftovers(folder: Path) -> Iterator[Path]:
    """What a killed process left half-written or half-removed."""
    return folder.glob(TEMPORARY + "*")


def publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make a written folder the checkpoint `final`: manifest, fsync, rename."""
    write_atomically(temporary / MANIFEST, manifest.to_json())
    move_into_place(temporary, final)
