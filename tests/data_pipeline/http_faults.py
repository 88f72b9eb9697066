"""A web server on this machine that serves a folder with byte ranges, and misbehaves on demand."""

import re
import socket
import struct
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("stall", "stall in body", "short", "reset", "no range", "shifted", "cut range")

RETRY_AFTER = "0"
"""Seconds that answers of 429 and 503 ask for."""


class FaultyServer:
    """Serves `folder`; a context manager.

    Each request takes the next of `faults` (a status such as "503", or one of `FAULTS`), and
    `always` once they are used up; "" answers properly. `requests` notes (path, range) of all.
    """

    def __init__(self, folder: Path, handler: "type[Handler] | None" = None) -> None:
        self.folder = folder
        self.faults: deque[str] = deque()
        self.always = ""
        self.lists = False  # whether a folder's address gives a page of links
        self.requests: list[tuple[str, str]] = []
        self.encodings: set[str] = set()  # that clients would accept
        self.released = threading.Event()  # ends what stalls
        bound = type("Bound", (handler or Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests from the folder of its `owner`."""

    protocol_version = "HTTP/1.1"
    owner: FaultyServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.owner.requests.append((self.path, asked))
        self.owner.encodings.add(self.headers.get("Accept-Encoding", ""))
        fault = self.owner.faults.popleft() if self.owner.faults else self.owner.always
        if fault == "stall":
            self.owner.released.wait(60)
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault.isdigit():
            self.answer(int(fault), b"sorry")
        else:
            self.serve(asked, fault)

    def serve(self, asked: str, fault: str) -> None:
        """Answer a request for a range ("" for the whole file) that fails in its body at most."""
        path = self.owner.folder / self.path.partition("?")[0].lstrip("/")
        if path.is_dir() and self.owner.lists:
            links = "".join(f'<a href="{entry.name}">x</a>' for entry in sorted(path.iterdir()))
            self.answer(200, links.encode(), fault=fault)
        elif not path.is_file():
            self.answer(404, b"")
        else:
            self.file(path.read_bytes(), asked, fault)

    def file(self, data: bytes, asked: str, fault: str) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if fault == "no range" or not match:
            self.answer(200, data)
            return
        first, last = int(match[1]), min(int(match[2]), len(data) - 1)
        if first >= len(data):
            self.answer(416, b"", f"bytes */{len(data)}")
            return
        if fault == "shifted":
            first += 1
        if fault == "cut range":
            last -= 1
        body = data[first : last + 1]
        self.answer(206, body, f"bytes {first}-{last}/{len(data)}", fault)

    def answer(
        self,
        status: int,
        body: bytes,
        content_range: str = "",
        fault: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"' if not content_range else '"v1"')
        if status in (429, 503):
            self.send_header("Retry-After", RETRY_AFTER)
        if content_range:
            self.send_header("Content-Range", content_range)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.send_body(body, fault)

    def send_body(self, body: bytes, fault: str) -> None:
        if self.command == "HEAD":
            return
        if fault in ("short", "stall in body"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall in body":
                self.owner.released.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # close sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True
        self.wfile = open("/dev/null", "wb")  # noqa: PTH123, SIM115 (the handler still flushes it)
