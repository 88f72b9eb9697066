"""Indexing one shard in one pass: columns of the usable samples, and what was wrong with others."""

from collections import Counter

from data_pipeline.chat import ChatSettings, template_fingerprint
from data_pipeline.index.columns import OF_IMAGES, OF_SAMPLES, ShardColumns
from data_pipeline.index.header import BROKEN, SCHEMA, ShardHeader
from data_pipeline.index.sample_row import Row, SampleFault, SampleReader
from data_pipeline.index.tar import ShardFault, group_samples, scan_tar
from data_pipeline.storage import ReadAhead, Shard, ShardStat, Storage
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.walk import is_about_the_data


def index_shard(
    shard: Shard, tokenizer: Tokenizer, chat: ChatSettings, storage: Storage, decode: bool = False
) -> tuple[ShardHeader, ShardColumns]:
    """Index one shard; samples that cannot be used are listed in the header's `bad`.

    With `decode` every picture is decoded, so that none is found damaged in training.

    ShardFault if the tar is truncated or damaged, or has no usable sample.
    """
    storage.forget()  # an earlier file of this name may still be open
    stat = storage.stat(shard)  # before reading: a shard that changes meanwhile will not fit it
    reader = ReadAhead(storage, shard, stat.bytes)
    samples = SampleReader(reader, tokenizer, chat, decode)
    found: dict[str, Row | SampleFault] = {}
    passed: Counter[str] = Counter()
    documents: dict[str, list[str]] = {}
    for key, group in group_samples(scan_tar(reader), passed):
        try:
            found[key] = samples.row(key, group)
        except SampleFault as fault:
            found[key] = fault
            if is_about_the_data(key) and not group.has_pictures():
                stem = key.rpartition("/")[2]
                documents[key] = [f"{stem}.{suffix}" for suffix in group.members]
    for key, names in documents.items():
        if isinstance(found[key], SampleFault):
            del found[key]
            passed.update(names)
    rows = {key: row for key, row in found.items() if isinstance(row, Row)}
    bad = [
        {"key": key, "fault": fault.fault, "reason": str(fault)}
        for key, fault in found.items()
        if isinstance(fault, SampleFault)
    ]
    if not rows:
        raise ShardFault(f"{shard} has no usable sample ({_why(bad)})")
    unused = sum(row.unused_images for row in rows.values())
    return _described(shard, stat, tokenizer, chat, _columns(rows), unused, bad, passed, decode)


def broken_shard(
    shard: Shard, tokenizer: Tokenizer, chat: ChatSettings, storage: Storage, fault: ShardFault
) -> tuple[ShardHeader, ShardColumns]:
    """The index of a shard that is left out whole: no samples, and why."""
    bad = [{"key": "", "fault": BROKEN, "reason": str(fault)}]
    columns = _columns({})
    stat = storage.stat(shard)
    return _described(shard, stat, tokenizer, chat, columns, 0, bad, Counter(), decode=True)


def _described(
    shard: Shard,
    stat: ShardStat,
    tokenizer: Tokenizer,
    chat: ChatSettings,
    columns: ShardColumns,
    unused_images: int,
    bad: list[dict[str, str]],
    passed: Counter[str],
    decode: bool,
) -> tuple[ShardHeader, ShardColumns]:
    return ShardHeader(
        schema=SCHEMA,
        shard=shard.name,
        bytes=stat.bytes,
        version=stat.version,
        tokenizer=tokenizer.fingerprint,
        tokenizer_source=tokenizer.source,
        template=template_fingerprint(chat),
        chat=chat.model_dump(),
        samples=len(columns),
        images=len(columns.image_offset),
        text_tokens=int(columns.text_tokens.sum(dtype="int64")),
        supervised_tokens=int(columns.supervised_tokens.sum(dtype="int64")),
        unused_images=unused_images,
        digest=columns.digest(),
        bad=bad,
        passed_over=dict(passed.most_common()),
        decoded=decode,
    ), columns


def _why(bad: list[dict[str, str]]) -> str:
    if bad:
        return f"{len(bad)} bad ones, the first: {bad[0]['key']}: {bad[0]['reason']}"
    return (
        'samples are members "{key}.json" with their images "{key}.*", or "{key}.jpg" with '
        '"{key}.txt"'
    )


def _columns(rows: dict[str, Row]) -> ShardColumns:
    images = [image for row in rows.values() for image in row.images]
    image_start = [0]
    for row in rows.values():
        image_start.append(image_start[-1] + len(row.images))
    listed = [row[: len(OF_SAMPLES)] for row in rows.values()]
    of_samples = zip(*listed, strict=True) if listed else [()] * len(OF_SAMPLES)
    of_images = zip(*images, strict=True) if images else [()] * len(OF_IMAGES)
    return ShardColumns.from_lists(
        list(rows),
        image_start=image_start,
        **dict(zip(OF_SAMPLES, of_samples, strict=True)),
        **dict(zip(OF_IMAGES, of_images, strict=True)),
    )
