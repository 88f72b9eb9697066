"""Stores on this machine that speak the real protocols, each behind a proxy that misbehaves."""

import http.client
import importlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage import Storage, StorageSettings
from tests.data_pipeline.http_faults import FaultyServer, Handler

PROTOCOLS = ("http", "s3", "gs", "hf")
_NEEDS = {"s3": ("s3fs", "moto"), "gs": ("gcsfs", "gcp_storage_emulator"), "hf": ()}
_EXPIRED_S3 = (
    b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>"
)
_EXPIRED_GS = json.dumps({"error": {"code": 401, "message": "Invalid Credentials"}}).encode()


@dataclass
class Store:
    """Shards behind a URL.

    url: of their folder, without a slash at its end.
    server: what is asked, with its faults; the store itself lies behind it.
    options: what Storage needs to reach it.
    elsewhere: URL of a bucket, repository or folder that is not there.
    """

    url: str
    server: FaultyServer
    elsewhere: str
    options: dict[str, Any] = field(default_factory=dict)

    def storage(self, **settings: Any) -> Storage:
        """With quick retries; the first request of a driver loads it, which may take long."""
        quick = {"attempts": 4, "backoff_s": 0.001, "timeout_s": 30, "deadline_s": 90}
        return Storage(StorageSettings(**{**quick, "options": self.options, **settings}))


@contextmanager
def open_store(protocol: str, folder: Path) -> Iterator[Store]:
    """A store of the protocol that holds the files of a folder."""
    _require(protocol)
    with ExitStack() as stack:
        yield {"http": _http, "s3": _s3, "gs": _gs, "hf": _hub}[protocol](folder, stack)


def _require(protocol: str) -> None:
    """Skip the test without its packages; fail it where REQUIRE_REMOTE asks for them."""
    for package in _NEEDS.get(protocol, ()):
        try:
            importlib.import_module(package)
        except ImportError:
            reason = f"{protocol}:// is tested with {package}: run make remote"
            (pytest.fail if os.environ.get("REQUIRE_REMOTE") else pytest.skip)(reason)


def _http(folder: Path, stack: ExitStack) -> Store:
    server = stack.enter_context(FaultyServer(folder))
    return Store(server.url, server, f"{server.url}/none")


def _s3(folder: Path, stack: ExitStack) -> Store:
    import boto3
    from moto.moto_api._internal.models import moto_api_backend
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    emulator = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    emulator.start()
    stack.callback(emulator.stop)
    upstream = "http://{}:{}".format(*emulator.get_host_and_port())
    moto_api_backend.reset()  # all servers of a process have the same buckets
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=upstream, region_name="us-east-1", **keys)
    client.create_bucket(Bucket="bucket")
    for path in filter(Path.is_file, folder.iterdir()):
        client.put_object(Bucket="bucket", Key=f"set/{path.name}", Body=path.read_bytes())
    proxy = stack.enter_context(Proxy(upstream, (400, _EXPIRED_S3)))
    options = {
        "endpoint_url": proxy.url,
        "key": "test",
        "secret": "hidden",
        "client_kwargs": {"region_name": "us-east-1"},
    }
    return Store("s3://bucket/set", proxy, "s3://other-bucket/set", options)


def _gs(folder: Path, stack: ExitStack) -> Store:
    from gcp_storage_emulator.server import create_server

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    emulator.start()
    stack.callback(emulator.stop)
    upstream = "http://{}:{}".format(*emulator._api._httpd.server_address[:2])
    for path in filter(Path.is_file, folder.iterdir()):
        connection = http.client.HTTPConnection(upstream.removeprefix("http://"))
        connection.request("PUT", f"/bucket/set/{path.name}", path.read_bytes())
        assert connection.getresponse().status == 200
        connection.close()
    proxy = stack.enter_context(Proxy(upstream, (401, _EXPIRED_GS)))
    options = {"endpoint_url": proxy.url, "token": "anon"}
    return Store("gs://bucket/set", proxy, "gs://other-bucket/set", options)


def _hub(folder: Path, stack: ExitStack) -> Store:
    hub = stack.enter_context(FaultyServer(folder, HubHandler))
    url = "hf://datasets/org/name@v1/set"
    elsewhere = "hf://datasets/org/none/set"
    return Store(url, hub, elsewhere, {"endpoint": hub.url, "token": "hf_hidden"})


class Proxy(FaultyServer):
    """Passes requests on to `upstream`, unless a fault says otherwise.

    One fault beside those of `FaultyServer`: "expired" answers as the store does when a token has
    expired.
    """

    def __init__(self, upstream: str, expired: tuple[int, bytes]) -> None:
        super().__init__(Path(), Forwarder)
        self.upstream, self.expired = upstream, expired


class Forwarder(Handler):
    """Asks the store behind a `Proxy`."""

    owner: Proxy

    def do_HEAD(self) -> None:
        self.do_GET()

    def serve(self, asked: str, fault: str) -> None:
        if fault == "expired":
            self.answer(*self.owner.expired)
            return
        connection = http.client.HTTPConnection(self.owner.upstream.removeprefix("http://"))
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send_body(body, fault)
        connection.close()


class HubHandler(Handler):
    """What the trainer asks of the Hub: one data set, org/name, with the revisions main and v1.

    The files of the folder are in set/ of revision v1; main is empty. As on the Hub, a file's
    address redirects to where its bytes lie.
    """

    def do_HEAD(self) -> None:
        self.do_GET()

    def serve(self, asked: str, fault: str) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/bytes/"):
            self.file((self.owner.folder / path.removeprefix("/bytes/")).read_bytes(), asked, fault)
            return
        match = re.fullmatch(r"/(api/)?datasets/org/name(?:/(\w+)/(main|v1)(?:/(.*))?)?", path)
        if fault == "expired" or not match:
            status = 401 if fault == "expired" else 404
            code = {} if status == 401 else {"X-Error-Code": "RepoNotFound"}
            self.answer(status, b'{"error": "Invalid credentials"}', headers=code)
            return
        kind, revision, file = match[2], match[3], match[4] or ""
        local = self.owner.folder / file.removeprefix("set/")
        if kind == "resolve":
            found = revision == "v1" and file.startswith("set/") and local.is_file()
            place = {"Location": f"/bytes/{local.name}", "X-Linked-ETag": f'"{local.name}"'}
            missing = {"X-Error-Code": "EntryNotFound"}
            if fault:  # of a body: it falls on the request for the bytes
                self.owner.faults.appendleft(fault)
            self.answer(302 if found else 404, b"", headers=place if found else missing)
            return
        self.answer(200, json.dumps(self._listing(kind, revision, file)).encode())

    def _listing(self, kind: str | None, revision: str, file: str) -> Any:
        if kind != "tree":
            return {"id": "org/name", "sha": "0" * 40, "siblings": [], "tags": []}
        if revision == "main":
            return []
        files = sorted(path for path in self.owner.folder.iterdir() if path.is_file())
        folder = {"type": "directory", "path": "set", "oid": "0" * 40, "size": 0}
        entries = [
            {"type": "file", "path": f"set/{p.name}", "oid": p.name, "size": p.stat().st_size}
            for p in files
        ]
        return entries if file == "set" else [folder, *entries]
