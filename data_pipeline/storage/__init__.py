"""Where shards lie and how their bytes are read: local files, or URLs through fsspec.

    storage = Storage()
    shards = storage.expand(["data/train", "s3://bucket/set/{000..127}.tar"])
    storage.read(shards[0], offset=512, size=100)

Reads of remote shards are tried again after failures that pass, and end within a deadline; what
fails even so is a `StoreError`.
"""

from data_pipeline.storage.ahead import ReadAhead
from data_pipeline.storage.expand import Patterns
from data_pipeline.storage.read_counts import ReadCounts
from data_pipeline.storage.retry import StorageSettings, StoreError, StoreOutage
from data_pipeline.storage.shard import Shard, ShardStat
from data_pipeline.storage.storage import Storage

__all__ = [
    "Patterns",
    "ReadAhead",
    "ReadCounts",
    "Shard",
    "ShardStat",
    "Storage",
    "StorageSettings",
    "StoreError",
    "StoreOutage",
]
