"""A real browser for tests: Chromium without a window, on local files."""

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

_TIMEOUT_S = 120
_VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


def require_chromium() -> None:
    """Skip the test where there is no Chromium, or fail it if REQUIRE_CHROMIUM=1 says otherwise."""
    if shutil.which("chromium"):
        return
    if os.environ.get("REQUIRE_CHROMIUM") == "1":
        pytest.fail("no chromium, but REQUIRE_CHROMIUM=1: run tests/install_chromium.sh")
    pytest.skip("no chromium: tests/install_chromium.sh installs it")


def browse(page: Path, folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """Open a page; returns what --dump-dom and the like print, and the console's messages."""
    command = [
        *("chromium", "--headless=new", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-dev-shm-usage", "--disable-background-networking", "--enable-logging=stderr"),
        f"--user-data-dir={folder / 'profile'}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        *arguments,
        page.resolve().as_uri(),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"HOME": str(folder)},
        start_new_session=True,
    ) as process:
        try:
            output, log = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its helpers, which hold the pipes
            raise
    assert process.returncode == 0, log
    return output, [line for line in log.splitlines() if "CONSOLE" in line]


@dataclass
class Element:
    """An element of a page, `inside` being the texts and elements in it."""

    tag: str
    attributes: dict[str, str]
    inside: list["Element | str"]

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    def find(self, tag: str, **attributes: str) -> "list[Element]":
        """Elements within, with these attributes ("" for any value; `_` stands for "-")."""
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        found = []
        for part in self.inside:
            if isinstance(part, str):
                continue
            if part.tag == tag and all(
                name in part.attributes and value in ("", part.attributes[name])
                for name, value in wanted.items()
            ):
                found.append(part)
            found += part.find(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> "Element":
        (found,) = self.find(tag, **attributes)
        return found


def parse(html: str) -> Element:
    """The elements of a page as the browser prints it."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    return parser.root


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {}, [])
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, [])
        self._open[-1].inside.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].inside.append(Element(tag, {n: v or "" for n, v in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        if any(element.tag == tag for element in self._open[1:]):
            while self._open.pop().tag != tag:
                pass

    def handle_data(self, data: str) -> None:
        self._open[-1].inside.append(data)
