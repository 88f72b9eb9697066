"""The rows of an evaluation on disk: appended as they come, so that a killed run goes on."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically

Row = dict[str, Any]
_NAME = re.compile(r"(\d+)-rank(\d+)\.jsonl")


class RowStore:
    """`folder`/rows/{count}-rank{rank}.jsonl and `folder`/settings.json.

    Any number of ranks may go on with what any number began.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self._rank = folder, rank
        self._rows = folder / "rows"

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Note what is evaluated; InputError if the folder holds results of something else."""
        path = self.folder / "settings.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            if changed:
                differences = "; ".join(
                    f"{name}: {before.get(name)!r} there, {settings.get(name)!r} now"
                    for name in changed
                )
                raise InputError(
                    f"{self.folder} holds an evaluation of something else ({differences}); give "
                    "another --out, or remove the folder"
                )
        elif self._rows.is_dir() and any(self._rows.iterdir()):
            raise InputError(
                f"{self._rows} has rows but no settings.json beside it; give another --out"
            )
        self._rows.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(dict(settings), indent=1).encode())

    def mend(self) -> None:
        """Cut off the line that a killed run left half-written in this rank's files."""
        for path in self._rows.glob(f"*-rank{self._rank}.jsonl"):
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(path, whole)

    def append(self, count: int, rows: Sequence[Row]) -> None:
        """Write rows of one token count; they are on disk when this returns."""
        path = self._rows / f"{count}-rank{self._rank}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with path.open("ab") as file:
            file.write(lines.encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> dict[int, dict[int, Row]]:
        """Token count -> sample -> row, of all ranks.

        Raises:
            InputError: a damaged line that is not a file's last, or a sample with two rows.
        """
        found: dict[int, dict[int, Row]] = {}
        for path in sorted(self._rows.glob("*.jsonl")):
            match = _NAME.fullmatch(path.name)
            if not match:
                continue
            rows = found.setdefault(int(match[1]), {})
            for row in _read_lines(path):
                if row["sample"] in rows:
                    raise InputError(
                        f"{row['name']} has two rows at {match[1]} tokens, one in {path}: two "
                        f"evaluations wrote to {self.folder} at once; remove {self._rows}"
                    )
                rows[row["sample"]] = row
        return found


def check_complete(
    rows: Mapping[int, Mapping[int, Row]], counts: Sequence[int], samples: Sequence[int]
) -> None:
    """InputError unless there is a row of every sample at every count."""
    for count in counts:
        missing = set(samples).difference(rows.get(count, {}))
        if missing:
            raise InputError(
                f"{len(missing)} of {len(samples)} samples have no row at {count} tokens; every "
                "node must see the same --out. Run the command again to compute them"
            )


def _read_lines(path: Path) -> list[Row]:
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # behind the last line end: nothing, or a part
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number} is damaged; remove the file") from error
    return rows
