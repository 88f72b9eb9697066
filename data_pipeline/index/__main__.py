"""Command line: index shards, then print the counts and where the index is."""

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from data_pipeline.chat import ChatSettings
from data_pipeline.errors import run_cli
from data_pipeline.index.build import build_index
from data_pipeline.index.files import find_tokenizer, folders_of, manifest_path
from data_pipeline.index.load import load_index
from data_pipeline.tokenizer import load_tokenizer

_DESCRIPTION = """\
Index webdataset shards in place: for every sample where its bytes lie, its token
counts and its image sizes. Training needs this; shards are never rewritten.

A shard is an uncompressed tar with, per sample, {key}.json
  {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"},
                                             {"type": "text", "text": "..."}]},
                {"role": "assistant", "content": [...]}]}
and the images it names, here {key}.0.png. Samples that cannot be used are left
out, printed, and listed in the manifest. Shards that did not change since the
last run are not read again; after an interruption, run the same command again.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; InputError for everything the user can set right."""
    options = _parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer or find_tokenizer(options.shards))
    chat = ChatSettings(system=options.system)
    build_index(options.shards, tokenizer, chat, options.workers)
    index = load_index(options.shards, tokenizer, chat)
    counts = {
        "shards": len(index.shards),
        "samples": len(index),
        "images": len(index.image_offset),
        "text tokens": index.text_tokens.sum(dtype=np.int64),
        "supervised tokens": index.supervised_tokens.sum(dtype=np.int64),
        "bad samples left out": len(index.bad),
    }
    print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    for folder in folders_of(index.shards):
        print(f"index: {manifest_path(folder)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.index",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="a folder of .tar files, a glob, a path, or a brace pattern: 's-{000..015}.tar'",
    )
    parser.add_argument(
        "--tokenizer",
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
        type=int,
        metavar="N",
        default=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        help="processes, each with a shard at a time (default: one per core)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_cli(main)
