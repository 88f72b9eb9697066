"""Help for older releases: the trainer is pinned to newer ones, but a GPU image may hold these."""

from contextlib import nullcontext

import torch
import torch.distributed
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed as integration


def fix_zero3_initialization() -> None:
    """Let models with weights that a parent module fills in be built under ZeRO-3.

    transformers before 5.23 gathers a module's own parameters only, while SigLIP's attention and
    MLP initialise those of their children, which are empty shards then.
    """
    if Version(transformers.__version__) < Version("5.23"):
        integration.initialize_weights_zero3 = _initialize_weights


@torch.no_grad()
def _initialize_weights(model: PreTrainedModel) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from transformers.initialization import guard_torch_init_functions

    def visit(module: nn.Module, owner: PreTrainedModel) -> None:
        near = [module]
        for child in module.children():
            if isinstance(child, PreTrainedModel):
                visit(child, child)
            else:
                visit(child, owner)
                near.append(child)
        own = [parameter for part in near for parameter in part.parameters(recurse=False)]
        with GatheredParameters(own, modifier_rank=0) if own else nullcontext():
            if not own or torch.distributed.get_rank() == 0:
                owner._initialize_weights(module)

    with guard_torch_init_functions():
        visit(model, model)
