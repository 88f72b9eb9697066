"""Run the checks of language models, small random ones of each family, and write what passed.

    python -m training.language_model_table
    python -m training.language_model_table --families gemma2 olmo3 --out runs/language_models.json

Prints the table of docs/model.md. Without --families the record is
training/results/language_models.json. It ends with exit code 1 where a check fails.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from data_pipeline.cli import command_parser, run_cli
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.paths import path_argument
from training.language_model_table.family_checks import TOLERANCE, passed, refusal, run_checks
from training.language_model_table.family_table import family_table
from training.language_model_table.tested_families import FAMILIES, REFUSED, Family

RECORD = Path("training/results/language_models.json")


def main(argv: list[str] | None = None) -> None:
    """The command; see the module's docstring."""
    options = parse_args(argv)
    record = make_record(options.families)
    out = options.out or (None if options.families else RECORD)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, (json.dumps(record, indent=1) + "\n").encode())
    print("\n".join(family_table(record)))
    failed = [row["family"] for row in record["families"] if not row["passed"]]
    failed += [row["family"] for row in record["refused"] if row["because"] is None]
    if failed:
        print(f"not as expected: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("training.language_model_table", __doc__)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--out", type=path_argument, help="the record's file")
    return parser.parse_args(argv)


def make_record(names: list[str] | None = None) -> dict[str, Any]:
    """What the checks of these families gave, of all without names."""
    known = {family.name: family for family in (*FAMILIES, *REFUSED)}
    if unknown := set(names or ()).difference(known):
        raise InputError(
            f"--families {', '.join(sorted(unknown))}: not among {', '.join(known)}; give these"
        )
    chosen = known.keys() if names is None else names
    torch.set_num_threads(1)
    return {
        "command": "python -m training.language_model_table",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tolerance": TOLERANCE,
        "families": [_tested(family) for family in FAMILIES if family.name in chosen],
        "refused": [
            {**_named(family), "because": refusal(family)}
            for family in REFUSED
            if family.name in chosen
        ],
    }


def _named(family: Family) -> dict[str, Any]:
    model_type = family.changes["model_type"]
    return {"family": family.name, "models": family.models, "model_type": model_type}


def _tested(family: Family) -> dict[str, Any]:
    found = run_checks(family)
    rounded = {k: v if isinstance(v, bool) else float(f"{v:.1g}") for k, v in found.items()}
    return {**_named(family), "note": family.note, **rounded, "passed": passed(found)}


if __name__ == "__main__":
    run_cli(main)
