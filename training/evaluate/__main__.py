"""Accuracy, latency, FLOPs and memory of an exported model on held-out shards, per token count."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_pipeline.cli import at_least, command_parser
from data_pipeline.errors import InputError
from data_pipeline.files import write_atomically
from data_pipeline.machine import git_commit, num_cores, versions
from data_pipeline.paths import path_argument, path_text
from training import exit_codes
from training.distributed import Ranks
from training.evaluate.accuracy_plot import plot_accuracy
from training.evaluate.budget import ServingBudget, decide, parse_budget
from training.evaluate.counts import EvaluationSettings, evaluate_counts
from training.evaluate.examples import HeldOut
from training.evaluate.group import evaluation_ranks
from training.evaluate.routing import Routing, RoutingSettings
from training.evaluate.summary import summarise, table
from training.evaluate.token_budget import budget_table, parse_token_budget
from training.generate import LoadedModel, add_model_arguments, load_asked

NO_COUNT_FITS = 1

_DESCRIPTION = """\
Score a model on held-out shards at several token counts. Answers must match
exactly, or by what a sample's metadata name: "metric" is exact, anls, relaxed
or choice (of the "choices" in metadata, or that the question lists), and
"answers" lists further right answers.

    python -m training.evaluate MODEL data/digits/eval --num-image-tokens 4 16 64
    torchrun --nproc-per-node 8 -m training.evaluate MODEL SHARDS --out runs/evaluation
    sbatch slurm/evaluate.sh MODEL SHARDS --out runs/evaluation

Started again with the same --out it goes on where it stopped, also with other
counts and another number of ranks. --budget names the smallest token count that
meets it; exit code 1 says that none does.

A router that chooses the count of each sample, so that the mean keeps to a budget,
is trained on a part of the samples and compared with a fixed count on the others:

    python -m training.evaluate MODEL SHARDS --train-router --budget tokens=16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns an exit code; every rank says what the user can set right."""
    options = _parse(arguments)
    try:
        means = [parse_token_budget(text) for text in options.budget]
        asked = zip(options.budget, means, strict=True)
        budgets = [parse_budget(text) for text, mean in asked if mean is None]
        with evaluation_ranks() as ranks:
            return _run(options, budgets, [mean for mean in means if mean is not None], ranks)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_codes.BAD_INPUT


def _run(
    options: argparse.Namespace, budgets: list[ServingBudget], means: list[float], ranks: Ranks
) -> int:
    loaded = load_asked(options, ranks.device)
    counts = loaded.check_counts(options.num_image_tokens or _default_counts(loaded))
    held_out = HeldOut(
        loaded,
        options.shards,
        options.tokenizer,
        options.index_dir,
        options.limit,
        options.reduced_jpeg,
    )
    out = options.out or Path("runs") / f"evaluation-{Path(options.model).resolve().name}"
    settings = EvaluationSettings(
        out=out,
        max_new_tokens=options.max_new_tokens,
        batch_tokens=options.batch_tokens,
        generate_all=options.generate,
        latency_samples=options.latency_samples,
    )
    if ranks.is_main:
        _say_left_out(held_out)
    routing = None
    if means or options.train_router:
        share = options.router_share if options.train_router else None
        asked = RoutingSettings(
            *(means, share, options.router, out, options.resamples, options.seed),
        )
        routing = Routing(loaded, held_out, counts, asked, ranks)
    rows, latencies = evaluate_counts(loaded, held_out, counts, settings, ranks)
    routed = routing.run(rows) if routing else None
    if not ranks.is_main:
        return exit_codes.OK
    trained = options.trained or loaded.trained_counts
    entries, resampled = summarise(loaded, rows, counts, trained, options.resamples, options.seed)
    for entry in entries:
        entry["latency"] = latencies.get(entry["num_image_tokens"])
    decisions = [decide(budget, entries, resampled) for budget in budgets]
    bad = [row for row in rows[counts[0]].values() if "bad" in row]
    title = f"{Path(options.model).resolve().name}, {entries[0]['samples']} samples"
    plot_accuracy(entries, out / "accuracy.png", title)
    record = {
        "model": options.model,
        "shards": options.shards,
        "counts": entries,
        "budgets": [vars(decision) for decision in decisions],
        **({"routing": routed} if routed else {}),
        "bad": [{"name": row["name"], "reason": row["bad"]} for row in bad],
        "bootstrap": {"resamples": options.resamples, "seed": options.seed},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **_machine(loaded, ranks),
    }
    text = table(entries)
    write_atomically(out / "results.json", json.dumps(record, indent=1).encode())
    write_atomically(out / "table.txt", (text + "\n").encode())
    print(f"\n{text}\n")
    if too_long := {e["num_image_tokens"]: e["too_long"] for e in entries if e["too_long"]}:
        print(f"longer than the context, counted as wrong: {too_long}")
    if ambiguous := {e["num_image_tokens"]: e["ambiguous"] for e in entries if e["ambiguous"]}:
        print(f"answers that state several options, counted as wrong: {ambiguous}")
    if bad:
        print(f"{len(bad)} samples cannot be used, the first {bad[0]['name']}: {bad[0]['bad']}")
    for decision in decisions:
        print(f"{decision.budget}  ->  {decision.reason}")
    if routed:
        print(f"router   {routed['router']}, trained on {routed['trained_on']} samples")
        for comparison in routed.get("budgets", []):
            print(f"\n{budget_table(comparison)}\n")
    print(f"results  {out / 'results.json'}\nplot     {out / 'accuracy.png'}")
    return NO_COUNT_FITS if any(d.count is None for d in decisions) else exit_codes.OK


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _default_counts(loaded: LoadedModel) -> list[int]:
    return loaded.trained_counts or [int(loaded.processor.num_image_tokens)]


def _say_left_out(held_out: HeldOut) -> None:
    if bad := held_out.index.bad:
        print(
            f"warning: the index left out {len(bad)} bad samples, the first "
            f"{bad[0].shard}:{bad[0].key}: {bad[0].reason}"
        )


def _machine(loaded: LoadedModel, ranks: Ranks) -> dict[str, Any]:
    return {
        "machine": {
            "device": loaded.device_name,
            "cores": num_cores(),
            "threads": torch.get_num_threads(),
            "ranks": ranks.world_size,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            **versions(("torch", "transformers")),
        },
        "commit": git_commit(),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("training.evaluate", _DESCRIPTION)
    add_model_arguments(parser)
    parser.add_argument(
        "shards", nargs="+", type=path_text, metavar="SHARDS", help="folders, globs or URLs"
    )
    whole = at_least(1)
    parser.add_argument(
        "--num-image-tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="tokens per tile, each a square (default: the counts that were trained)",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="default: runs/evaluation-MODEL"
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="latency=50ms | accuracy=99%% | tokens=64",
        help="name the token count to serve: the most accurate in time, or the smallest with this "
        "share of the best accuracy; tokens: compare the router at this mean of tokens per tile",
    )
    parser.add_argument(
        "--train-router",
        action="store_true",
        help="train a router on a part of the samples, and keep it beside the model",
    )
    parser.add_argument(
        "--router-share",
        type=_share,
        default=0.5,
        metavar="PART",
        help="of the samples to train the router on; the others are reported (0.5)",
    )
    parser.add_argument(
        "--router", type=path_argument, metavar="FILE", help="default: MODEL/router.safetensors"
    )
    parser.add_argument(
        "--trained", nargs="+", type=int, metavar="N", help="counts to mark as trained"
    )
    parser.add_argument(
        "--generate",
        action="store_true",
        help="generate every answer; exact ones are otherwise read off one forward pass",
    )
    parser.add_argument("--max-new-tokens", type=whole, default=128, metavar="N", help="(128)")
    parser.add_argument("--limit", type=whole, metavar="N", help="so many samples, evenly spread")
    parser.add_argument(
        "--batch-tokens", type=whole, default=16384, metavar="N", help="of a batch (16384)"
    )
    parser.add_argument(
        "--latency-samples",
        type=at_least(0),
        default=16,
        metavar="N",
        help="answers timed one at a time, on rank 0; 0 for none (16)",
    )
    parser.add_argument(
        "--resamples", type=whole, default=2000, metavar="N", help="of the bootstrap (2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument(
        "--tokenizer", type=path_text, metavar="PATH", help="that the index was made with"
    )
    parser.add_argument("--index-dir", type=path_argument, metavar="DIR", help="where the index is")
    parser.add_argument(
        "--reduced-jpeg",
        action="store_true",
        help="decode large JPEGs at a smaller scale, which is faster; the processor does not",
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    exit_codes.run_rank(main)
