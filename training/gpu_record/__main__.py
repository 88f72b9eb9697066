"""Run everything that needs a GPU, in stages of less than eight minutes, and record it.

    make gpu-record                                  # or python -m training.gpu_record
    python -m training.gpu_record --list             # the stages, and what became of each
    python -m training.gpu_record --within-s 580     # begin no stage that would not end by then
    python -m training.gpu_record --stage train_3b --again
    python -m training.gpu_record --rehearse --out runs/rehearsal   # on a CPU, tiny shapes

Results go to kernels/results/ and training/results/, into a folder named after the GPU, with the
state of every stage in gpu_record.json: done, partial or failed. The same command goes on with
what is not done; kernels and tests go on inside a stage, too, which gets up to four turns. One GPU
is used. Nothing is installed or downloaded: a stage that lacks a package fails and says so, and the
next one begins. Exit status: 0 when all stages are done, 1 when one is not, 2 without a GPU, 75
after a signal.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from data_pipeline.cli import command_parser
from data_pipeline.errors import InputError
from data_pipeline.paths import path_argument
from training import exit_codes
from training.gpu_record.record_stages import ROOT, Places, Stage, all_stages
from training.gpu_record.stage_runs import DONE, GpuRecord, run_stages
from training.health import StopRequest


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("training.gpu_record", __doc__)
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this; repeat")
    parser.add_argument("--out", type=path_argument, help="another folder for the results")
    parser.add_argument("--list", action="store_true", help="show the stages and end")
    parser.add_argument("--again", action="store_true", help="forget what the stages measured")
    parser.add_argument(
        "--within-s", type=float, default=float("inf"), metavar="S", help="time there is"
    )
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny shapes")
    return parser.parse_args(argv)


def _device(rehearse: bool) -> str:
    """Name of the GPU that is measured."""
    if rehearse:
        return "rehearsal"
    if not torch.cuda.is_available():
        raise InputError(
            "no NVIDIA GPU is visible to PyTorch, and all of this record is measured on one: run "
            "it where nvidia-smi shows one with a CUDA build of torch, or add --rehearse to try "
            "every stage at tiny shapes on the CPU"
        )
    return torch.cuda.get_device_name()


def _chosen(stages: list[Stage], names: list[str] | None) -> list[Stage]:
    known = {stage.name: stage for stage in stages}
    if unknown := [name for name in names or () if name not in known]:
        raise InputError(f"--stage {unknown[0]} is unknown; expected one of {', '.join(known)}")
    return [stage for stage in stages if not names or stage.name in names]


def _show(stages: list[Stage], record: GpuRecord) -> None:
    for stage in stages:
        found = record.stages.get(stage.name, {})
        print(f"{stage.name:14} {record.state(stage):10} ~{stage.expected_s} s  {stage.says}")
        if found:
            print(f"{'':14} commit {found['commit']}  {found.get('reason', '')}".rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        out = args.out or (ROOT / "runs" / "gpu_record" if args.rehearse else None)
        places = Places.of(_device(args.rehearse), out)
        record = GpuRecord(places)
        stages = _chosen(all_stages(places, args.rehearse), args.stage)
        if args.list:
            _show(stages, record)
            return exit_codes.OK
        for stage in stages if args.again else ():
            record.forget(stage)
        with StopRequest() as stop:
            run_stages(stages, record, stop, args.within_s)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.BAD_INPUT
    print(f"the state of every stage: {places.state}")
    if stop.requested:
        return exit_codes.PREEMPTED
    return exit_codes.OK if all(record.state(s) == DONE for s in stages) else exit_codes.CRASH


if __name__ == "__main__":
    sys.exit(main())
