"""One tar file, by path or URL."""

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Shard:
    """A tar file of samples: a local path as given, or a URL such as "s3://bucket/0.tar"."""

    url: str

    @property
    def is_remote(self) -> bool:
        """Whether it is read through fsspec."""
        return "://" in self.url

    @property
    def protocol(self) -> str:
        """Of a remote shard, e.g. "s3"."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """File name, e.g. "000000.tar"."""
        return posixpath.basename(str(self))

    @property
    def stem(self) -> str:
        """File name without ".tar"."""
        return self.name.removesuffix(".tar")

    @property
    def folder(self) -> str:
        """The path or URL without the file name."""
        if self.is_remote:
            return posixpath.dirname(str(self))
        return str(Path(self.url).parent)

    @property
    def path(self) -> Path:
        """Of a local shard."""
        assert not self.is_remote, f"{self} has no local path"
        return Path(self.url)

    def __str__(self) -> str:
        """As messages show it: without what may be a secret of an HTTP URL, query and user."""
        if not is_http(self.url):
            return self.url
        return re.sub("^(https?://)[^/]*@", r"\1", self.url.partition("?")[0])


@dataclass(frozen=True)
class ShardStat:
    """What decides whether a shard changed: size, and the store's own mark of its content."""

    bytes: int
    version: str  # modification time in ns of a local file; ETag or the like of a remote one


def is_http(url: str) -> bool:
    """Whether a URL is of HTTP, where "?" begins a query instead of being a pattern."""
    return url.startswith(("http://", "https://"))
