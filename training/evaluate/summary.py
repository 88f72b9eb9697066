"""What an evaluation found per token count: accuracy with its uncertainty, cost, a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.balance import CostModel
from data_pipeline.text_table import text_table
from training.evaluate.in_training import ALL
from training.generate import LoadedModel

Row = dict[str, Any]
CONFIDENCE = 0.95
_CHUNK = 1 << 24  # resampled scores held at once


def resample_means(scores: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of bootstrap resamples of the samples, the same ones for every row.

    Args:
        scores: float64 [counts, S].

    Returns:
        float64 [counts, resamples].
    """
    rng = np.random.default_rng(seed)
    size = scores.shape[1]
    means = np.empty((len(scores), resamples))
    step = max(1, _CHUNK // size)
    for first in range(0, resamples, step):
        drawn = rng.integers(0, size, (min(step, resamples - first), size))
        for i, row in enumerate(scores):
            means[i, first : first + len(drawn)] = row[drawn].mean(axis=1)
    return means


def summarise(
    loaded: LoadedModel,
    rows: Mapping[int, Mapping[int, Row]],
    counts: Sequence[int],
    trained: Sequence[int] | None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """One entry per token count, and the resampled accuracies [counts, resamples].

    An entry has accuracy, low and high (the bootstrap's 95 % interval) of all samples and by level
    of detail and metric; FLOPs of a forward pass over prompt and reference answer, and the bytes of
    its keys and values, means over the samples. Samples that cannot be used are left out.
    """
    good = sorted(s for s, row in rows[counts[0]].items() if "bad" not in row)
    scores = np.array([[rows[count][s]["score"] for s in good] for count in counts])
    first = [rows[counts[0]][s] for s in good]
    groups = {"by_detail": [r["detail"] for r in first], "by_metric": [r["metric"] for r in first]}
    overall = _intervals(scores, resamples, seed)
    entries: list[dict[str, Any]] = []
    for i, count in enumerate(counts):
        own = [rows[count][s] for s in good]
        entries.append(
            {
                "num_image_tokens": count,
                "trained": None if trained is None else count in trained,
                "samples": len(good),
                **{name: float(values[i]) for name, values in overall.items()},
                "too_long": sum(bool(row.get("too_long")) for row in own),
                "ambiguous": sum(bool(row.get("ambiguous")) for row in own),
                **_costs(loaded, own),
            }
        )
    for key, names in groups.items():
        for name in sorted(set(names)):
            mask = np.array([n == name for n in names])
            part = _intervals(scores[:, mask], resamples, seed)
            for i, entry in enumerate(entries):
                values = {n: float(v[i]) for n, v in part.items()}
                entry.setdefault(key, {})[name] = {**values, "samples": int(mask.sum())}
    return entries, resample_means(scores, resamples, seed)


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Keys and values of one token over all layers, in bytes; windows of attention not counted."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * itemsize


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries for people, a row per token count."""
    details = [d for d in entries[0]["by_detail"] if d != ALL]
    details = details if len(entries[0]["by_detail"]) > 1 else []
    head = ["tokens", "", "accuracy %", "95 % interval", *details]
    head += ["first token ms", "answer ms", "GFLOP", "KV MiB"]
    lines = [head]
    for entry in entries:
        unseen = {True: "trained", False: "unseen", None: ""}[entry["trained"]]
        latency = entry.get("latency") or {}
        lines.append(
            [
                str(entry["num_image_tokens"]),
                unseen,
                f"{100 * entry['accuracy']:.1f}",
                f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}",
                *(f"{100 * entry['by_detail'][d]['accuracy']:.1f}" for d in details),
                f"{latency['first_token_ms']:.1f}" if latency else "-",
                f"{latency['answer_ms']:.1f}" if latency else "-",
                f"{entry['gflop']:.4g}",
                f"{entry['kv_cache_mib']:.4g}",
            ]
        )
    return text_table(lines, left=())


def _intervals(scores: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    means = resample_means(scores, resamples, seed)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail], axis=1)
    return {"accuracy": scores.mean(axis=1), "low": low, "high": high}


def _costs(loaded: LoadedModel, rows: Sequence[Row]) -> dict[str, float]:
    config = loaded.config
    cost = CostModel.from_configs(config.vision_config.to_dict(), config.text_config.to_dict())
    tokens = np.array([row["prompt_tokens"] + row["answer_tokens"] for row in rows])
    flops = cost.flops(tokens, np.array([row["tiles"] for row in rows])) / 3  # without backward
    kv = tokens * kv_bytes_per_token(config.text_config, loaded.dtype.itemsize)
    return {
        "prompt_tokens": float(np.mean([row["prompt_tokens"] for row in rows])),
        "gflop": float(flops.mean() / 1e9),
        "kv_cache_mib": float(kv.mean() / 2**20),
        "kv_cache_mib_max": float(kv.max() / 2**20),
    }
