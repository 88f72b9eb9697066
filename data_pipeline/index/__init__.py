"""Index of webdataset shards: enough to plan without opening a tar, and to read one sample.

    python -m data_pipeline.index SHARDS... [--tokenizer PATH] [--system TEXT] [--workers N]
    python -m data_pipeline.index SHARDS... --check

The shards themselves stay as they are; files.py says where the index lies, columns.py what is in
it. A run that is killed leaves the earlier index in place, and the next run goes on where it
stopped. A shard whose size and modification time (or ETag) are unchanged is not read again.
"""

from data_pipeline.index.builder import build_index
from data_pipeline.index.check import CheckReport, check_index
from data_pipeline.index.columns import ShardColumns
from data_pipeline.index.header import BadSample
from data_pipeline.index.index import Index
from data_pipeline.index.open_index import load_index

__all__ = [
    "BadSample",
    "CheckReport",
    "Index",
    "ShardColumns",
    "build_index",
    "check_index",
    "load_index",
]
