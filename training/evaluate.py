"""Accuracy, latency, FLOPs and memory of an exported model on held-out shards, per token count.

    python -m training.evaluate MODEL data/digits/eval --num-image-tokens 4 16 64
    torchrun --nproc-per-node 2 -m training.evaluate MODEL data/digits/eval --out runs/evaluation

`training/evaluation` holds the parts, this trainer's own evaluation among them.
"""

from training.evaluation.in_training import (
    ALL,
    Evaluation,
    Score,
    evaluate,
    sample_details,
    score_answers,
)

__all__ = ["ALL", "Evaluation", "Score", "evaluate", "sample_details", "score_answers"]

if __name__ == "__main__":
    from training.evaluation.cli import main
    from training.exit_codes import run_rank

    run_rank(main)
