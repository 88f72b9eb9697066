"""Accuracy and loss on held-out shards at every token count.

An answer counts as right when greedy decoding would produce it exactly: see `forced_decoding`.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipeline.loader import IGNORE, PackBuilder, PackedBatch
from data_pipeline.mixture import Mixture
from data_pipeline.plan import EvaluationPlan, PackPlan
from data_pipeline.text_table import text_table
from training.distributed import Ranks, all_reduce_max, all_reduce_sum
from training.engine_interface import Engine
from training.evaluate.forced_decoding import forced_answer
from training.model.pack_inputs import model_inputs

ALL = "all"


@dataclass
class Score:
    """Sums over answers: exact matches, and their tokens without the end of turn.

    supervised, loss: the tokens that training would learn, of all turns, and their cross-entropy.
    """

    answers: int = 0
    exact: int = 0
    tokens: int = 0
    tokens_right: int = 0
    supervised: int = 0
    loss: float = 0.0


@dataclass
class Evaluation:
    """Scores per (level of detail, token count)."""

    scores: dict[tuple[str, int], Score] = field(default_factory=dict)

    @property
    def details(self) -> list[str]:
        return sorted({detail for detail, _ in self.scores}, key=lambda d: (d == ALL, d))

    @property
    def counts(self) -> list[int]:
        return sorted({count for _, count in self.scores})

    def accuracy(self) -> dict[str, dict[int, float]]:
        """Level of detail -> token count -> exact match in 0..1."""
        return {
            detail: {
                count: self.scores[detail, count].exact / self.scores[detail, count].answers
                for count in self.counts
            }
            for detail in self.details
        }

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "detail": detail,
                "num_image_tokens": count,
                "accuracy": score.exact / score.answers,
                "token_accuracy": score.tokens_right / max(1, score.tokens),
                "answers": score.answers,
            }
            for (detail, count), score in sorted(self.scores.items())
        ]

    def to_row(self, step: int) -> dict[str, Any]:
        """The evaluation of a step as a row of evaluations.jsonl.

        `accuracy` and `loss`, by which checkpoints are compared, are means over the token counts.
        """
        results = [
            {**row, "loss": self.loss(row["detail"], row["num_image_tokens"])}
            for row in self.to_json()
        ]
        overall = [row for row in results if row["detail"] == ALL]
        means = {
            name: sum(row[name] for row in overall) / len(overall)
            for name in ("accuracy", "loss")
            if overall
        }
        return {"step": step, **means, "results": results}

    def loss(self, detail: str, count: int) -> float:
        """Cross-entropy per supervised token."""
        score = self.scores[detail, count]
        return score.loss / max(1, score.supervised)

    def table(self) -> str:
        """Accuracy in percent, a row per level of detail and a column per token count.

        The second number of a cell is the share of answer tokens that are right.
        """
        rows = [["exact match % (tokens %)", *(f"{count} tokens" for count in self.counts)]]
        for detail in self.details:
            cells = []
            for count in self.counts:
                score = self.scores[detail, count]
                tokens = 100 * score.tokens_right / max(1, score.tokens)
                cells.append(f"{100 * score.exact / score.answers:.1f} ({tokens:.1f})")
            answers = self.scores[detail, self.counts[0]].answers
            rows.append([f"{detail}, {answers} answers", *cells])
        return text_table(rows)

    def losses(self) -> str:
        """The loss at each token count, in words."""
        found = (f"{self.loss(ALL, n):.4f} ({n} tokens)" for d, n in self.scores if d == ALL)
        return f"loss per supervised token: {', '.join(found)}"


def evaluate(
    engine: Engine,
    plan: EvaluationPlan,
    builder: PackBuilder,
    sides: list[int],
    ranks: Ranks,
    loss_chunks: int = 1,
    stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Score every sample of the plan at every side; all ranks must call this.

    None if `stop` was true on some rank between two batches.

    Args:
        engine: its model is put in evaluation mode and back.
        plan: the packs of the held-out samples.
        builder: builds its packs.
        sides: token grid sides n; n^2 tokens per tile.
        ranks: packs are shared out over them.
        loss_chunks: slices of a pack's logits.
        stop: whether this rank was asked to stop; given on all ranks or on none.
    """
    details = sample_details(builder.mixture, plan)
    names = sorted({ALL, *details.values()})
    evaluation = Evaluation()
    engine.eval()
    for side in sorted(set(sides)):
        sums: dict[str, Score] = defaultdict(Score)
        for pack in _share(plan.packs(side), ranks):
            # Together: a rank that left alone would leave the others in a collective.
            if stop is not None and all_reduce_max([float(stop())], ranks.device)[0]:
                engine.train()
                return None
            batch = builder.build(pack)
            with torch.no_grad():
                output = engine(**model_inputs(batch, ranks.device, loss_chunks))
            scored = score_answers(batch, output.predictions.cpu(), output.token_losses.cpu())
            for sample, score in scored:
                for name in {ALL, details[sample]}:
                    _add(sums[name], score)
        flat = [float(value) for name in names for value in vars(sums[name]).values()]
        total = all_reduce_sum(flat, ranks.device)
        size = len(vars(Score()))
        for i, name in enumerate(names):
            *counts, loss = total[size * i : size * (i + 1)]
            answers, exact, tokens, right, supervised = map(round, counts)
            score = Score(answers, exact, tokens, right, supervised, loss)
            if score.answers:
                evaluation.scores[name, side * side] = score
    engine.train()
    return evaluation


def _share(packs: list[PackPlan], ranks: Ranks) -> list[PackPlan]:
    """This rank's packs; every rank gets the same number, as an engine's ranks run in lockstep."""
    share = packs[ranks.rank :: ranks.world_size]
    rounds = -(-len(packs) // ranks.world_size)
    return share + [PackPlan.empty()] * (rounds - len(share))


def score_answers(
    batch: PackedBatch, predictions: torch.Tensor, token_losses: torch.Tensor
) -> list[tuple[int, Score]]:
    """(sample id, score) of each sample: its last assistant turn, and the loss of all.

    Args:
        batch: the pack, on the host.
        predictions: int64 [K], most likely token at each supervised position, in order.
        token_losses: float32 [K], the cross-entropy there.
    """
    positions = (batch.labels != IGNORE).nonzero().flatten()
    reference = batch.labels[positions]
    bounds = torch.searchsorted(positions, batch.cu_seqlens.to(positions.dtype)).tolist()
    results = []
    for i, sample in enumerate(batch.sample_ids):
        own = slice(bounds[i], bounds[i + 1])
        if own.start == own.stop:
            continue  # nothing supervised, or a stand-in for a bad sample
        gaps = (positions[own].diff() > 1).nonzero().flatten().tolist()
        last = slice(own.start + (gaps[-1] + 1 if gaps else 0), own.stop)
        found = forced_answer(predictions[last], reference[last])
        loss = float(token_losses[own].double().sum())
        answer = (1, int(found.exact), found.tokens, found.tokens_right)
        results.append((sample, Score(*answer, own.stop - own.start, loss)))
    return results


def sample_details(mixture: Mixture, plan: EvaluationPlan) -> dict[int, str]:
    """The level of detail of each sample of the plan, from its metadata, else `all`."""
    details = {}
    for sample in plan.samples:
        metadata = mixture.read_sample(sample).get("metadata") or {}
        details[sample] = str(metadata.get("detail", ALL))
    return details


def _add(total: Score, score: Score) -> None:
    for name, value in vars(score).items():
        setattr(total, name, getattr(total, name) + value)
