"""Write down what a finished run measured, with the machine and versions it ran on.

python -m training.record runs/digits out.json --command "make pretrain" --wall-s 200
"""

import json

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.files import write_atomically
from data_pipeline.paths import path_argument
from training.record.run_record import record


def main() -> None:
    parser = command_parser("training.record", __doc__)
    parser.add_argument("run", type=path_argument, help="the run's output_dir")
    parser.add_argument("out", type=path_argument, help="JSON file to write")
    parser.add_argument("--command", required=True, help="the command that ran it")
    parser.add_argument("--wall-s", type=float, required=True, help="how long it took, by `time`")
    args = parser.parse_args()
    text = json.dumps(record(args.run, args.command, args.wall_s), indent=1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, text.encode() + b"\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
