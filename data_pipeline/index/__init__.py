"""Index of webdataset shards: enough to plan without opening a tar, and to read one sample.

    python -m data_pipeline.index SHARDS... [--tokenizer PATH] [--system TEXT] [--workers N]

The shards themselves stay as they are; files.py says what is written beside them, shard.py what
is in it. A run that is killed leaves the earlier index in place, and the next run goes on where
it stopped. A shard whose size and modification time are unchanged is not read again.
"""

from data_pipeline.index.build import build_index
from data_pipeline.index.files import expand_shards
from data_pipeline.index.load import Index, load_index
from data_pipeline.index.shard import BadSample
from data_pipeline.index.tar import read_member

__all__ = ["BadSample", "Index", "build_index", "expand_shards", "load_index", "read_member"]
