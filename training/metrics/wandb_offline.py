"""How far the files of an offline W&B run reach: what waited in a killed process is not in them."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

SETTLED_S, LONGEST_S = 2.0, 30.0
_BLOCK, _TAIL = 2**15, 2**21
_WHOLE, _FIRST, _LAST = 1, 2, 4


def last_logged(folder: Path, run: str) -> int:
    """The last `step=` that was given to `run.log`, over all starts in a folder; 0 without any.

    To be asked before the next start is made. Waits until the newest file rests: W&B's own process
    writes on for a moment after ours was killed, and names folders by the second.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    paths = sorted(folder.glob(f"wandb/offline-run-*-{run}/*.wandb"), reverse=True)
    end = time.monotonic() + LONGEST_S
    while paths and time.monotonic() < end and time.time() - _written_at(paths) < SETTLED_S:
        time.sleep(0.1)
    for path in paths:
        found = [
            int(json.loads(item.value_json))
            for content in records(path, _TAIL)
            for item in Record.FromString(content).history.item
            if item.key == "_step" or list(item.nested_key) == ["_step"]
        ]
        if found:
            return found[-1]
    return 0


def _written_at(paths: list[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


def records(path: Path, tail: int | None = None) -> Iterator[bytes]:
    """The records of a file, which is a LevelDB log behind 7 bytes, or those in its last bytes.

    A record lies in pieces in blocks of 32 KiB; the end that a kill cut off is left out.
    """
    size = path.stat().st_size
    begin = max(0, size - tail) // _BLOCK * _BLOCK if tail else 0
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read()
    at, content = 0 if begin else 7, b""
    whole = False
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # too little for a piece: zeros
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        whole = kind in (_WHOLE, _FIRST) or whole
        content = piece if kind in (_WHOLE, _FIRST) else content + piece
        if kind in (_WHOLE, _LAST) and whole and at <= len(data):
            yield content
