"""Check the ranks of a job before training: GPU, shared folder, shard index, clock, all-reduce.

    srun python -m training.preflight training/configs/digits.yaml output_dir=runs/first
    python -m training.preflight --settings training/configs/digits.yaml    # only show the settings

slurm/preflight.sh runs it on every GPU of a job. Rank 0 prints what it found, and names a bad node
instead of waiting for it. Exit status: 0; 1 for a bad node; 2 for a wrong setting.
"""

import argparse
import sys

from data_pipeline.cli import command_parser
from data_pipeline.errors import InputError
from data_pipeline.yaml_text import write_yaml
from training import exit_codes
from training.config import load_config
from training.zero3.extra import check_extra


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("training.preflight", __doc__)
    parser.add_argument("config", help="YAML file, for example training/configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds (60)")
    parser.add_argument("--settings", action="store_true", help="print the settings, check nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        check_extra(config)
        if args.settings:
            print(write_yaml(config.model_dump(mode="json")), end="")
            return exit_codes.OK
        from training.preflight.phases import preflight

        return preflight(config, args.timeout)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_codes.BAD_INPUT


if __name__ == "__main__":
    exit_codes.run_rank(main)
