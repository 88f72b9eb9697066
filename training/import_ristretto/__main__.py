"""Convert the released Ristretto-3B folder to a model folder of this project, and back.

python -m training.import_ristretto Ristretto-3B/ out/ristretto
python -m training.import_ristretto --reverse out/ristretto Ristretto-back/

Both directions read and write weights, settings and tokenizer; no code of the source folder runs.
"""

import transformers

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.paths import path_argument
from training.export.safetensors_files import parse_size
from training.import_ristretto.release import from_release, to_release
from training.import_ristretto.release_config import CODE_FILES


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("training.import_ristretto", __doc__)
    parser.add_argument("source", type=path_argument, help="folder to read")
    parser.add_argument(
        "out", type=path_argument, help="folder to write; must not exist, or be empty"
    )
    parser.add_argument("--reverse", action="store_true", help="from this project's form")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one weights file (%(default)s)"
    )
    args = parser.parse_args(argv)
    # It warns of a config that it has no class for; here it reads nothing but the tokenizer.
    transformers.logging.set_verbosity_error()
    convert = to_release if args.reverse else from_release
    for note in convert(args.source, args.out, parse_size(args.max_shard_size)):
        print(f"note: {note}")
    print(f"model             {args.out}")
    if args.reverse:
        print(f"its code          copy {', '.join(CODE_FILES)} of the release into it")


if __name__ == "__main__":
    run_cli(main)
