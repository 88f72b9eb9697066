"""What the index of a shard was made of: its entry in the manifest."""

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.chat import ChatSettings, template_fingerprint
from data_pipeline.storage import Shard, ShardStat
from data_pipeline.tokenizer import Tokenizer

BROKEN = "broken shard"
"""The fault of a shard that is left out whole; its key is empty."""
SCHEMA = 3  # raise it when the columns, or what their numbers mean, change


@dataclass(frozen=True)
class BadSample:
    """A sample that is left out: shard file name, key, why, and which kind of fault it is."""

    shard: str
    key: str
    reason: str
    fault: str = ""

    @property
    def name(self) -> str:
        """ "shard-file:key", or the shard that is left out whole."""
        return f"{self.shard}:{self.key}" if self.key else self.shard


@dataclass(frozen=True)
class ShardHeader:
    """What an index of a shard was made of, and its counts."""

    schema: int
    shard: str
    bytes: int
    version: str  # decides only whether to index again, so that copied data sets keep working
    tokenizer: str
    tokenizer_source: str
    template: str
    chat: dict[str, str]
    samples: int
    images: int
    text_tokens: int
    supervised_tokens: int
    unused_images: int  # members that look like images and that no message names
    digest: str  # of the columns: ties the manifest to this very file
    bad: list[dict[str, str]]  # {"key", "fault", "reason"}
    passed_over: dict[str, int]  # members that belong to no sample, by suffix
    decoded: bool  # every picture was decoded, not only its header

    def describes(
        self,
        shard: Shard,
        stat: ShardStat,
        tokenizer: Tokenizer,
        chat: ChatSettings,
        decode: bool = False,
    ) -> bool:
        """Whether indexing the shard as it is now would give this same index."""
        return (
            self.schema == SCHEMA
            and (self.shard, self.bytes) == (shard.name, stat.bytes)
            and self.version == stat.version
            and self.tokenizer == tokenizer.fingerprint
            and self.template == template_fingerprint(chat)
            and (self.decoded or not decode)
        )

    @property
    def broken(self) -> str | None:
        """Why the shard is left out whole; None if it is not."""
        return self.bad[0]["reason"] if self.bad and self.bad[0]["fault"] == BROKEN else None

    def identity(self) -> list[Any]:
        """What a data set's fingerprint covers; not where the shard lies."""
        return [self.shard, self.bytes, self.digest, self.tokenizer, self.template, self.schema]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def bad_samples(self) -> list[BadSample]:
        """The samples left out."""
        return [BadSample(self.shard, b["key"], b["reason"], b["fault"]) for b in self.bad]
