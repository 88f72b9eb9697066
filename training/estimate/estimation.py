"""An estimate from a config: its packs, its engine on fake tensors, its time."""

from collections.abc import Callable
from typing import Any

from data_pipeline.corpus import Corpus
from data_pipeline.errors import InputError
from training.config import RunConfig
from training.estimate.rank_memory import measure
from training.estimate.report import Estimate
from training.estimate.speed import Cluster
from training.estimate.workload import find_corpus, vocabulary_of, workload_of
from training.flops import PackCost
from training.zero3.extra import check_extra


def estimate_run(
    config: RunConfig,
    cluster: Cluster,
    thorough: bool,
    say: Callable[[str], None],
    corpus: Corpus | None = None,
) -> Estimate:
    """Estimate a run on GPUs, in this process, which must not be in a process group.

    Args:
        thorough: see `training.estimate.rank_memory.measure`.
        corpus: the run's data, where they are open already.

    Raises:
        InputError: the number of GPUs does not divide the packs of a step, or the settings do not
            describe a model.
    """
    packs = config.data.pack.packs_per_step
    if packs % cluster.ranks:
        raise InputError(
            f"data.pack.packs_per_step is {packs}, which {cluster.ranks} GPUs do not divide; give "
            "another number of GPUs, or change packs_per_step"
        )
    if config.train.precision == "auto":  # bf16 on every GPU that is known
        train = config.train.model_copy(update={"precision": "bf16"})
        config = config.model_copy(update={"train": train})
    check_extra(config)
    tokenizer: Any
    tokenizer, why = vocabulary_of(config)
    if not why and corpus is None:
        corpus, why = find_corpus(config)
    if why:
        say(f"warning: no plan: {why}")
    chunks = -(-config.data.pack.max_tokens // config.train.loss_chunk_tokens)
    work = workload_of(config, corpus, PackCost.of(config, tokenizer, chunks))
    ranks = min(2, cluster.ranks)
    memory = measure(config, tokenizer, work.worst, ranks, on_gpu=True, thorough=thorough)
    weights = memory.resident["masters"] * memory.ranks / 4  # fp32, and of trained weights only
    return Estimate(config, cluster, memory, work, weights)
