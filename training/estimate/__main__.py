"""Estimate memory, traffic and time of a run before it is launched.

    python -m training.estimate training/configs/stage2_pretrain.yaml --gpus 8 --nodes 4 --gpu h100

Memory is what the trainer's engine allocates on fake tensors; time is calculated. The packs are the
plan's where the data are indexed, else the fullest ones that the settings allow.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.cli import add_config_arguments, at_least, command_parser, fraction, run_cli
from data_pipeline.files import write_atomically
from training.config import load_config
from training.estimate.estimation import estimate_run
from training.estimate.report import plot, text, to_json
from training.estimate.speed import Cluster, gpu_named
from training.zero3.process_group import quiet_libraries


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; InputError for an unknown GPU and for a config that does not fit."""
    parser = command_parser("training.estimate", __doc__)
    add_config_arguments(parser)
    add = parser.add_argument
    add("--gpu", default="h100", help="as kernels/gpu_datasheets.py calls it (default: h100)")
    add("--gpus", type=at_least(1), default=8, help="of a node (default: 8)")
    add("--nodes", type=at_least(1), default=1, help="default: 1")
    add("--efficiency", type=fraction, default=0.5, help="part of the GPU's peak (default: 0.5)")
    add("--network", type=float, default=50.0, metavar="GB/S", help="per GPU (default: 50)")
    add("--quick", action="store_true", help="one step only: half the time, less detail")
    add("--plot", type=Path, help="picture to write")
    add("--json", type=Path, help="file to write")
    options: argparse.Namespace = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    gpu = gpu_named(options.gpu)
    config = load_config(options.config, options.overrides)
    cluster = Cluster(gpu, options.gpus, options.nodes, options.efficiency, options.network)
    found = estimate_run(config, cluster, thorough=not options.quick, say=print)
    print(text(found))
    if options.plot:
        plot(found, options.plot)
    if options.json:
        write_atomically(options.json, json.dumps(to_json(found), indent=1).encode())
    found.check_fits()


if __name__ == "__main__":
    run_cli(main)
