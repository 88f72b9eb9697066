"""Turn data into webdataset shards.

python -m data_pipeline.prepare --format llava SRC.json --images DIR OUT/
python -m data_pipeline.prepare --format folder DIR OUT/
python -m data_pipeline.prepare --format finevision SRC OUT/
python -m data_pipeline.prepare --format digits OUT/
python -m data_pipeline.prepare --format grid OUT/

llava    LLaVA's instruction format (.json list, or .jsonl): {"id", "image": name or list of names
         or absent, "conversations": [{"from": "human"|"gpt"|"system", "value": "..<image>.."}]}.
folder   images with a caption beside each: photo.jpg with photo.txt, or photo.json holding
         {"caption": "..."}.
finevision
         parquet files as FineVision has them, a file or a folder (needs pyarrow): columns "images",
         a list of {bytes, path}, and "texts", a list of {user, assistant}. The images come first
         in the first turn; "source" is kept with the sample.
digits   demo corpus: grids of real handwritten digits (needs scikit-learn).
grid     demo corpus: grids of coloured cells.

llava, folder and finevision write OUT/000000.tar, ...; digits and grid write
OUT/train/000000.tar, ..., OUT/eval/000000.tar, ... and OUT/tokenizer.model. OUT/prepare.json tells
what was made and which faulty samples were left out, and why. OUT appears only when everything is
written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.cli import run_cli
from data_pipeline.errors import InputError
from data_pipeline.prepare.shard_writer import REPORT_NAME, ShardLimits

DEMO_OPTIONS: dict[str, Any] = {
    "train_samples": 24_000,
    "eval_samples": 600,
    "seed": 0,
    "image_size": 32,
    "detail": None,
}
# Which options belong to which formats, with their defaults; those of all formats are not here.
FORMAT_OPTIONS: dict[str, dict[str, Any]] = {
    "llava": {"images": None},
    "folder": {},
    "finevision": {"min_relevance": None},
    "digits": DEMO_OPTIONS,
    "grid": DEMO_OPTIONS,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, choices=tuple(FORMAT_OPTIONS))
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="[SRC] OUT")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run wrote to OUT"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=ShardLimits.samples, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=ShardLimits.num_bytes,
        help="begin a new shard after this many bytes (default: %(default)s)",
    )
    llava = parser.add_argument_group("options of llava")
    llava.add_argument(
        "--images", type=Path, metavar="DIR", help="where the images are (default: beside SRC)"
    )
    finevision = parser.add_argument_group("options of finevision")
    finevision.add_argument(
        "--min-relevance",
        type=int,
        metavar="N",
        help='leave out samples whose "relevance_min" is below N of 1..5; those without stay',
    )
    demo = parser.add_argument_group("options of digits and grid")
    for name, metavar, meaning in (
        ("train_samples", "N", "samples to train on"),
        ("eval_samples", "N", "samples to evaluate on, over all k"),
        ("seed", "N", "what the samples are drawn with"),
        ("image_size", "PX", "side of the images"),
    ):
        option = "--" + name.replace("_", "-")
        text = f"{meaning} (default: {DEMO_OPTIONS[name]})"
        demo.add_argument(option, type=int, metavar=metavar, help=text)
    demo.add_argument(
        "--detail",
        type=int,
        nargs="+",
        metavar="K",
        help="k x k cells per image (default: digits 1 2, grid 1 2 4)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    # Intermixed: options may stand between SRC and OUT.
    args = build_parser().parse_intermixed_args(arguments)
    options = _format_options(args)
    limits = ShardLimits(args.samples_per_shard, args.shard_bytes)
    *sources, out = args.paths
    expected = 1 if args.format in ("llava", "folder", "finevision") else 0
    if len(sources) != expected:
        usage = "SRC OUT" if expected else "OUT"
        given = " ".join(map(str, args.paths))
        raise InputError(f"--format {args.format} takes the paths {usage}, found: {given}")
    common: dict[str, Any] = {"limits": limits, "overwrite": args.overwrite}
    # Imported here: --help and mistakes answer at once.
    if args.format == "llava":
        from data_pipeline.prepare.llava import prepare_llava

        report = prepare_llava(sources[0], out, **options, **common)
    elif args.format == "folder":
        from data_pipeline.prepare.folder import prepare_folder

        report = prepare_folder(sources[0], out, **common)
    elif args.format == "finevision":
        from data_pipeline.prepare.finevision import prepare_finevision

        report = prepare_finevision(sources[0], out, **options, **common)
    else:
        from data_pipeline.prepare.demo_corpus import prepare_demo

        options["details"] = options.pop("detail")
        report = prepare_demo(args.format, out, **options, **common)
    _print_summary(report, out)


def _format_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the chosen format; an option of another one is an error, not ignored."""
    own = FORMAT_OPTIONS[args.format]
    for format, names in FORMAT_OPTIONS.items():
        for name in names:
            if name not in own and getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} is for --format {format}, not {args.format}: drop it.")
    given = {name: getattr(args, name) for name in own}
    return {name: own[name] if value is None else value for name, value in given.items()}


def _print_summary(report: dict[str, Any], out: Path) -> None:
    for part in ("train", "eval"):
        if part in report:
            counts = report[part]
            print(f"{out / part}: {counts['samples']} samples, {counts['images']} images")
    if "skipped" in report:
        print(f"{out}: {report['samples']} samples, {report['images']} images")
        for option, count in report.get("left_out", {}).items():
            print(f"{count} samples left out by {option}")
        if report["skipped"]:
            print(f"{len(report['skipped'])} faulty samples skipped: see {out / REPORT_NAME}")
    if "vocab_size" in report:
        print(f"{out / 'tokenizer.model'}: {report['vocab_size']} tokens")


if __name__ == "__main__":
    run_cli(main)
