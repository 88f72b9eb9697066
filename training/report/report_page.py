"""The page of `training.report`: facts of runs put into the template."""

from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.html_page import page_environment, percent, prefixed
from data_pipeline.inspect.charts import grid_lines, tile_lines
from data_pipeline.inspect.content import visible
from training.checkpoint import setting_changes
from training.checkpoint.saver import gigabytes
from training.goodput.accounting import ALL_PARTS, duration
from training.report.run_charts import charts
from training.report.run_facts import COUNTED, RunFacts, name_apart

_NAMES = {"bad_samples": "bad samples", "too_long": "samples too long", "store_retries": "retries"}


def render(runs: list[RunFacts]) -> str:
    """The whole page."""
    name_apart(runs)
    environment = page_environment(Path(__file__).parent)
    environment.filters.update(duration=duration, gigabytes=gigabytes, visible=visible)
    environment.globals.update(grid_lines=grid_lines, tile_lines=tile_lines)
    pictures = charts(runs)
    return environment.get_template("report.html.j2").render(
        runs=runs,
        made=datetime.now().astimezone().isoformat(" ", "seconds"),
        summary=_summary(runs),
        pictures={
            section: [uri for where, uri in pictures if where == section] for section, _ in pictures
        },
        parts=ALL_PARTS,
        evaluations=[(run, _evaluation(run)) for run in runs if run.evaluations],
        differences=_differences(runs),
    )


def _summary(runs: list[RunFacts]) -> list[tuple[str, list[str]]]:
    """(what, a value per run); rows that no run has a value for are left out."""
    rows: list[tuple[str, list[str]]] = [
        ("state", [run.state for run in runs]),
        (
            "steps",
            [f"{run.step:,} of {run.steps:,}" if run.steps else f"{run.step:,}" for run in runs],
        ),
        ("loss of the last step", [f"{run.rows[-1]['loss']:.4f}" for run in runs]),
        ("accuracy", [_last(run, "accuracy", percent) for run in runs]),
        ("held-out loss", [_last(run, "loss", "{:.4f}".format) for run in runs]),
        ("samples", [f"{run.total('samples'):,.0f}" for run in runs]),
        ("images", [f"{run.total('images'):,.0f}" for run in runs]),
        ("tokens", [f"{run.total('tokens'):,.0f}" for run in runs]),
        ("time in steps", [duration(run.total("step_s")) for run in runs]),
        ("tokens/s", [f"{run.rate('tokens'):,.0f}" for run in runs]),
        ("images/s", [f"{run.rate('images'):,.1f}" for run in runs]),
        ("FLOPs", [prefixed(run.total("flops")) if run.total("flops") else "" for run in runs]),
        ("MFU", [_mean(run, "mfu") for run in runs]),
        ("HFU", [_mean(run, "hfu") for run in runs]),
        ("padding", [_mean(run, "padding") for run in runs]),
        ("data wait", [_mean(run, "data_wait") for run in runs]),
        ("goodput", [percent(run.goodput.goodput) if run.goodput else "" for run in runs]),
        ("failures", [str(run.goodput.failures) if run.goodput else "" for run in runs]),
        ("skipped steps", [f"{run.rows[-1].get('skipped_steps', 0):g}" for run in runs]),
        *((_NAMES[key], [f"{run.total(key):g}" for run in runs]) for key in COUNTED),
        *(
            (name, [_machine(run, name) for run in runs])
            for name in ("machine", "python", "commit")
        ),
        ("versions", [_versions(run) for run in runs]),
    ]
    return [(name, values) for name, values in rows if any(values)]


def _last(run: RunFacts, key: str, text: Any) -> str:
    value = run.evaluations[-1].get(key) if run.evaluations else None
    return text(value) if isinstance(value, int | float) else ""


def _mean(run: RunFacts, key: str) -> str:
    value = run.mean(key)
    return "" if value is None else percent(value)


def _machine(run: RunFacts, name: str) -> str:
    return str(run.starts[-1].get(name) or "") if run.starts else ""


def _versions(run: RunFacts) -> str:
    found = run.starts[-1].get("versions") if run.starts else None
    return ", ".join(f"{name} {version}" for name, version in (found or {}).items())


def _evaluation(run: RunFacts) -> tuple[int, list[int], list[tuple[str, list[str]]]]:
    """Step, token counts, and (level of detail, accuracy per count) of the last evaluation."""
    row = run.evaluations[-1]
    counts = sorted({result["num_image_tokens"] for result in row["results"]})
    by_detail: dict[str, dict[int, str]] = {}
    for result in row["results"]:
        cell = percent(result["accuracy"])
        by_detail.setdefault(result["detail"], {})[result["num_image_tokens"]] = cell
    names = sorted(by_detail, key=lambda name: (name == "all", name))
    return (
        row["step"],
        counts,
        [(name, [by_detail[name].get(count, "") for count in counts]) for name in names],
    )


def _differences(runs: list[RunFacts]) -> list[tuple[str, list[str]]]:
    """(run, its settings that differ from the first run's)."""
    first = runs[0].config
    return [(run.name, setting_changes(first, run.config)) for run in runs[1:]]
