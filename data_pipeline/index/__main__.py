"""Command line: index shards, then print the counts and where the index is; or check them."""

import argparse
import re
import sys
from collections.abc import Sequence

from data_pipeline.chat import ChatSettings
from data_pipeline.cli import at_least, command_parser, fraction, run_cli, storage_option
from data_pipeline.errors import InputError
from data_pipeline.index.builder import build_index
from data_pipeline.index.check import check_index
from data_pipeline.index.header import BROKEN
from data_pipeline.index.index import Index
from data_pipeline.index.index_files import find_index_files, find_tokenizer
from data_pipeline.index.open_index import load_index
from data_pipeline.machine import num_cores
from data_pipeline.paths import path_text
from data_pipeline.storage import Storage, StorageSettings
from data_pipeline.storage.expand import passed_over
from data_pipeline.tokenizer import load_tokenizer

MAX_BAD_FRACTION = 0.01
TOO_MANY_LEFT_OUT = 1

_DESCRIPTION = """\
Index webdataset shards in place: for every sample where its bytes lie, its token
counts and its image sizes. Training needs this; shards are never rewritten.

A shard is an uncompressed tar with, per sample, {key}.json
  {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"},
                                             {"type": "text", "text": "..."}]},
                {"role": "assistant", "content": [...]}]}
and the images it names, here {key}.0.png. Shards of img2dataset are taken as they
are: {key}.jpg (or any other picture) with its caption in {key}.txt, or under
"caption" in {key}.json. So are records in {key}.json as other trainers have them:
"conversations", "messages" with strings and <image>, "question" and "answer"; the
pictures are the members that they name, or those beside them.

Samples that cannot be used are left out, printed, and listed in the manifest; so
are shards that are damaged or hold no sample.
Shards that did not change since the last run are not read again; after an
interruption, run the same command again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point, returns the exit status; InputError for what the user can set right."""
    options = _parse(arguments)
    storage = Storage(StorageSettings(options=dict(options.storage_option)))
    if options.check:
        _check(options, storage)
        return 0
    tokenizer = load_tokenizer(options.tokenizer or find_tokenizer(storage.expand(options.shards)))
    chat = ChatSettings(system=options.system)
    places = options.index_dir, storage
    build_index(
        *(options.shards, tokenizer, chat, options.workers, *places, options.share),
        decode=options.decode,
        strict=options.strict,
    )
    part, parts = options.share
    if parts > 1:
        print(f"share {part}/{parts} is done; once all are, run without --share to publish")
        return 0
    index = load_index(options.shards, tokenizer, chat, *places)
    counts = {
        "shards": len(index.shards),
        "samples": len(index),
        "images": index.images,
        "text tokens": index.totals["text_tokens"],
        "supervised tokens": index.totals["supervised_tokens"],
        "bad samples left out": len(index.bad),
    }
    for text in passed_over(options.shards):
        print(text)
    print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    for files in find_index_files(index.shards, options.index_dir).values():
        print(f"index: {files.manifest}")
    return _verdict(index, options.max_bad_fraction)


def _verdict(index: Index, most: float) -> int:
    """The exit status: whether more was left out than may be."""
    broken = sum(bad.fault == BROKEN for bad in index.bad)
    samples = len(index.bad) - broken
    share = max(samples / (samples + len(index)), broken / len(index.shards))
    if share <= most:
        return 0
    first = index.bad[0]
    print(
        f"error: {100 * share:.3g} % of the samples or shards cannot be used, more than "
        f"--max-bad-fraction {most}; the manifest names them, the first {first.name}: "
        f"{first.reason}. The index is written",
        file=sys.stderr,
    )
    return TOO_MANY_LEFT_OUT


def _check(options: argparse.Namespace, storage: Storage) -> None:
    report = check_index(options.shards, options.index_dir, storage, options.workers)
    if report.differences:
        shards = len({difference.shard for difference in report.differences})
        raise InputError(
            f"{len(report.differences)} differences in {shards} of {report.shards} shards (above); "
            "restore the shards, or index them again"
        )
    print(
        f"{report.shards:,} shards, {report.samples:,} samples, {report.bytes:,} bytes are as they "
        "were when they were indexed"
    )


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if part >= parts:
        raise argparse.ArgumentTypeError(f"expected K/N with K from 0 to N - 1, found {text}")
    return part, parts


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("data_pipeline.index", _DESCRIPTION)
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        type=path_text,
        help="a folder of .tar files, a glob, a path, a URL (s3://, gs://, hf://, https://), or a "
        "brace pattern: 's-{000..015}.tar'",
    )
    parser.add_argument(
        "--tokenizer",
        type=path_text,
        metavar="PATH",
        help="sentencepiece .model file, Hugging Face folder or hub name, the one used in training "
        "(default: tokenizer.model beside the shards or one folder up)",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        default=ChatSettings().system,
        help="system prompt for samples without one, as in training; '' for none "
        "(default: %(default)r)",
    )
    parser.add_argument(
        "--workers",
        type=at_least(1),
        metavar="N",
        default=num_cores(),
        help="processes, each with a shard at a time (default: one per core)",
    )
    parser.add_argument(
        "--index-dir",
        type=path_text,
        metavar="DIR",
        help="local folder for the index, as data.index_dir in training; needed for remote shards "
        "(default: index/ beside the shards)",
    )
    parser.add_argument(
        "--share",
        type=_share,
        metavar="K/N",
        default=(0, 1),
        help="index only part K of N (from 0), for several machines at a time; a run without it "
        "publishes the index (slurm/index.sh does both)",
    )
    _add_checks(parser)
    parser.add_argument(
        "--storage-option",
        type=storage_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="passed to fsspec, as data.storage.options in training: anon=true",
    )
    return parser.parse_args(arguments)


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every picture once, not only its header: those that cannot be used are left "
        "out now, not met in training. Run it once on data of unknown origin",
    )
    parser.add_argument(
        "--strict", action="store_true", help="a shard that cannot be used ends the run"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=MAX_BAD_FRACTION,
        metavar="X",
        help="exit with status 1 if a larger part of samples or shards was left out (%(default)s)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read every member and compare it with the index; nothing is written, exit status 2 "
        "if anything differs",
    )


if __name__ == "__main__":
    run_cli(lambda: sys.exit(main()))
