"""Write a checkpoint as a folder that loads with transformers alone.

python -m training.export runs/digits out/digits                     # the newest whole checkpoint
python -m training.export runs/digits/checkpoints/step-00001200 out/digits --dtype bf16
python -m training.export runs/lora out/lora --adapter               # beside the base, not merged
"""

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.paths import path_argument, path_text
from training.export import export
from training.export.adapter_folder import FOLDER
from training.export.safetensors_files import parse_size


def main(argv: list[str] | None = None) -> None:
    parser = command_parser("training.export", __doc__)
    parser.add_argument(
        "checkpoint", type=path_argument, help="a checkpoint, or a run's output_dir"
    )
    parser.add_argument(
        "out", type=path_argument, help="folder to write; must not exist, or be empty"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of the weights (default: as in training)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of one weights file (%(default)s)"
    )
    parser.add_argument(
        "--config", type=path_argument, help="the run's config.yaml, if it is elsewhere"
    )
    parser.add_argument(
        "--tokenizer", type=path_text, help="the run's tokenizer, if it is elsewhere"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="leave adapters apart, in OUT/adapter, for PEFT"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of the weights (train.ema)"
    )
    args = parser.parse_args(argv)
    run = export(
        args.checkpoint,
        args.out,
        dtype=args.dtype,
        max_bytes=parse_size(args.max_shard_size),
        config=args.config,
        tokenizer=args.tokenizer,
        adapter=args.adapter,
        ema=args.ema,
    )
    print(f"checkpoint        {run.checkpoint}")
    print(f"model             {args.out}")
    if args.adapter:
        print(f"adapter           {args.out / FOLDER}")
    print(f"model card        {args.out / 'README.md'} (the license is yours to give)")


if __name__ == "__main__":
    run_cli(main)
