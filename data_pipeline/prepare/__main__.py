"""Turn data into webdataset shards.

python -m data_pipeline.prepare SRC OUT/                     # what SRC holds is told by its content
python -m data_pipeline.prepare SRC.json --images DIR OUT/
python -m data_pipeline.prepare hf://datasets/ORG/NAME OUT/   # parquet; s3://, gs://, https:// too
python -m data_pipeline.prepare --format folder DIR OUT/
python -m data_pipeline.prepare --format digits OUT/

records  files with a record for every sample: .json (a list, or an object that holds one), .jsonl,
         .parquet, .arrow, .csv, .tsv, JSON and CSV also packed (.gz, .zst), a folder of such parts
         or that datasets saved, an ImageFolder with its metadata.jsonl or .csv. A record has turns
         ("messages", "conversations", "texts"), or a "question" with its "answer" (and "choices"),
         or a "caption"; its pictures are in "image" or "images", or inside the turns, as paths,
         bytes or data: URIs. They go where the text says <image>, or else first. llava, messages
         and finevision are names for the same. --map and --ignore are for other keys.
folder   images with a caption beside each: photo.jpg with photo.txt, photo.jpg.txt or
         photo.caption, or photo.json holding {"caption": "..."}.
mixture  a list of datasets: InternVL's meta JSON or LLaVA-NeXT's data YAML. Each is converted to
         OUT/NAME, and OUT/mixture.yaml is the data.datasets section, weights carried over. Typed
         again after an interruption, the command keeps the datasets that are finished.
digits   demo corpus: grids of real handwritten digits (needs scikit-learn).
scans    demo corpus: the same at five densities, 1 to 25 digits in pictures of one size.
grid     demo corpus: grids of coloured cells.
pages    demo corpus: documents, tables and charts in several sizes and fonts, asked for one word, a
         number or a whole row.

OUT/prepare.json tells what was made, which samples were left out and why, and which files were
passed over; demo corpora write OUT/train, OUT/eval and OUT/tokenizer.model. OUT appears only when
everything is written. Exit status: 0; 1 if more was left out than --max-bad-fraction; 2 if nothing
was written.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.cli import fraction, run_cli, storage_option
from data_pipeline.errors import InputError
from data_pipeline.paths import path_argument, path_text
from data_pipeline.prepare.shard_writer import REPORT_NAME, ShardLimits

DEMO_OPTIONS: dict[str, Any] = {
    "train_samples": 24_000,
    "eval_samples": 600,
    "seed": 0,
}
GRID_OPTIONS: dict[str, Any] = {**DEMO_OPTIONS, "image_size": None, "detail": None}
RECORD_OPTIONS: dict[str, Any] = {
    "images": None,
    "min_relevance": None,
    "map": [],
    "ignore": [],
    "storage_option": [],
}
RECORD_FORMATS = ("records", "llava", "messages", "finevision")
# Which options belong to which formats, with their defaults; those of all formats are not here.
FORMAT_OPTIONS: dict[str, dict[str, Any]] = {
    "auto": RECORD_OPTIONS,
    **dict.fromkeys(RECORD_FORMATS, RECORD_OPTIONS),
    "folder": {},
    "mixture": RECORD_OPTIONS,
    "digits": GRID_OPTIONS,
    "scans": GRID_OPTIONS,
    "grid": GRID_OPTIONS,
    "pages": DEMO_OPTIONS,
}
DEMOS = tuple(name for name, options in FORMAT_OPTIONS.items() if "seed" in options)
MAX_BAD_FRACTION = 0.01
MOST_REASONS = 20
TOO_MANY_LEFT_OUT = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--format", default="auto", choices=tuple(FORMAT_OPTIONS), help="(default: by content)"
    )
    parser.add_argument("paths", nargs="+", type=_path_or_url, metavar="PATH", help="[SRC] OUT")
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
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=MAX_BAD_FRACTION,
        metavar="X",
        help="exit with status 1 if more than this part was left out as faulty (%(default)s)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first sample that cannot be used"
    )
    records = parser.add_argument_group("options of records and mixture")
    records.add_argument(
        "--images",
        type=path_argument,
        metavar="DIR",
        help="where the images are (default: beside SRC)",
    )
    records.add_argument(
        "--map",
        action="append",
        metavar="KEY=NAME",
        help="read KEY (question, answer, image, ...) from the records' NAME; with commas for more",
    )
    records.add_argument(
        "--ignore", action="append", metavar="NAME", help="leave a key of the records unread"
    )
    records.add_argument(
        "--storage-option",
        type=storage_option,
        action="append",
        metavar="NAME=VALUE",
        help="passed to fsspec where SRC is a URL: anon=true",
    )
    records.add_argument(
        "--min-relevance",
        type=int,
        metavar="N",
        help='leave out records whose "relevance_min" is below N of 1..5; those without stay',
    )
    _add_demo_options(parser.add_argument_group("options of demo corpora"))
    return parser


def _path_or_url(text: str) -> Path | str:
    return path_text(text) if "://" in text else path_argument(text)


def _add_demo_options(demo: Any) -> None:
    for name, meaning in (
        ("train_samples", "samples to train on"),
        ("eval_samples", "samples to evaluate on, over all levels of detail"),
        ("seed", "what the samples are drawn with"),
    ):
        option = "--" + name.replace("_", "-")
        text = f"{meaning} (default: {DEMO_OPTIONS[name]})"
        demo.add_argument(option, type=int, metavar="N", help=text)
    demo.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="side of the images, in grids (default: 32, scans 60)",
    )
    demo.add_argument(
        "--detail",
        type=int,
        nargs="+",
        metavar="K",
        help="k x k cells per image, in grids (default: digits 1 2, scans 1 to 5, grid 1 2 4)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; returns the exit status."""
    # Intermixed: options may stand between SRC and OUT.
    args = build_parser().parse_intermixed_args(arguments)
    options = _format_options(args)
    limits = ShardLimits(args.samples_per_shard, args.shard_bytes)
    *sources, out = args.paths
    if isinstance(out, str):
        raise InputError(f"OUT is the URL {out}: shards are written to a local folder; copy them")
    expected = 0 if args.format in DEMOS else 1
    if len(sources) != expected:
        usage = "SRC OUT" if expected else "OUT"
        given = " ".join(map(str, args.paths))
        raise InputError(f"--format {args.format} takes the paths {usage}, found: {given}")
    # Imported here: --help and mistakes answer at once.
    if not expected:
        from data_pipeline.prepare.demo_corpus import prepare_demo

        options["details"] = options.pop("detail", None)
        report = prepare_demo(args.format, out, **options, limits=limits, overwrite=args.overwrite)
        for part in ("train", "eval"):
            counts = report[part]
            print(f"{out / part}: {counts['samples']} samples, {counts['images']} images")
        print(f"{out / 'tokenizer.model'}: {report['vocab_size']} tokens")
        return 0
    from data_pipeline.prepare.convert import Conversion

    conversion = Conversion(limits, args.overwrite, args.strict)
    reports = _convert(args.format, sources[0], out, options, conversion)
    bad = [_print_summary(report, path) for path, report in reports.items()]
    if max(bad) > args.max_bad_fraction:
        print(
            f"error: {100 * max(bad):.3g} % of the samples could not be used, more than "
            f"--max-bad-fraction {args.max_bad_fraction}; {REPORT_NAME} names them. What could be "
            "used is written",
            file=sys.stderr,
        )
        return TOO_MANY_LEFT_OUT
    return 0


def _convert(
    format: str, source: Path | str, out: Path, options: dict[str, Any], conversion: Any
) -> dict[Path, dict[str, Any]]:
    """Convert a source; returns the report of every folder of shards that was written."""
    from data_pipeline.prepare.folder import prepare_folder
    from data_pipeline.prepare.from_records import prepare_records
    from data_pipeline.prepare.mixtures import prepare_mixture
    from data_pipeline.prepare.sources import FOLDER, MIXTURE, RECORDS, find_source
    from data_pipeline.storage import Storage, StorageSettings

    images = options.pop("images", None)
    if images is not None and not images.is_dir():
        raise InputError(f"the image folder {images} does not exist; name it with --images")
    options |= {"renamed": _mapping(options.pop("map", [])), "ignored": options.pop("ignore", [])}
    kind = {"auto": None, "folder": FOLDER, "mixture": MIXTURE}.get(format, RECORDS)
    storage = Storage(StorageSettings(options=dict(options.pop("storage_option", []))))
    found = find_source(source, kind, options["renamed"], storage)
    print(f"{source}: {found.what}")
    if found.kind == FOLDER and isinstance(source, Path):
        return {out: prepare_folder(source, out, conversion=conversion)}
    if found.kind == MIXTURE and isinstance(source, Path):
        reports = prepare_mixture(source, out, images=images, conversion=conversion, **options)
        return {out / name: report for name, report in reports.items()}
    report = prepare_records(
        found.files,
        out,
        source=source,
        images=images,
        begun=found.begun,
        passed_over=found.passed,
        conversion=conversion,
        format=format,
        **options,
    )
    return {out: report}


def _mapping(given: Sequence[str]) -> dict[str, str]:
    """--map question=prompt,answer=label: what is read -> the key that holds it."""
    pairs = [pair for text in given for pair in text.split(",")]
    if wrong := [pair for pair in pairs if not all(pair.partition("="))]:
        raise InputError(f"--map {wrong[0]!r}: expected KEY=NAME, as in --map question=prompt")
    return dict(pair.split("=", 1) for pair in pairs)


def _format_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the chosen format; an option of another one is an error, not ignored."""
    own = FORMAT_OPTIONS[args.format]
    for format, names in FORMAT_OPTIONS.items():
        for name in names:
            if name not in own and getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                format = "records" if format == "auto" else format
                raise InputError(f"{option} is for --format {format}, not {args.format}: drop it.")
    given = {name: getattr(args, name) for name in own}
    return {name: own[name] if value is None else value for name, value in given.items()}


def _print_summary(report: Mapping[str, Any], out: Path) -> float:
    """Print what became of the samples and files; returns the share that could not be used."""
    print(f"{out}: {report['samples']} samples, {report['images']} images")
    for option, count in report.get("left_out", {}).items():
        print(f"{count} samples left out by {option}")
    skipped = len(report["skipped"])
    if skipped:
        print(f"{skipped} faulty samples skipped: see {out / REPORT_NAME}")
        width = len(str(skipped))
        for reason, count in list(report["reasons"].items())[:MOST_REASONS]:
            print(f"  {count:>{width}}  {reason}")
    for what, counts in report["passed_over"].items():
        if what == "broken links":
            print(f"files passed over, {what}: {', '.join(counts[:MOST_REASONS])}")
        else:
            text = ", ".join(f"{name} {count}" for name, count in counts.items())
            print(f"files passed over {what}: {text[:400]}")
    return float(skipped / max(1, skipped + report["samples"]))


if __name__ == "__main__":
    run_cli(lambda: sys.exit(main()))
