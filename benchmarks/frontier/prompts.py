"""VPT-deep (Jia et al., Visual Prompt Tuning, ECCV 2022): learned tokens before every block, anew in each."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fact_peft.architecture.blocks import find_block_linears, find_blocks, stream_width


class DeepPrompts(nn.Module):
    """A model whose blocks see `num_prompts` learned tokens behind the first token, and which ends without them.

    Only for a single stack of blocks that take and return tokens (N, length, width).

    Args:
        model: The backbone with its head.
        num_prompts: Tokens in each block.
    """

    def __init__(self, model: nn.Module, num_prompts: int) -> None:
        super().__init__()
        self.model = model
        blocks = list(find_blocks(model).values())
        width = stream_width(find_block_linears(model).values())
        # The authors': uniform, as Xavier's initialisation of the patch embedding would have it.
        patch = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight[0].numel()
        bound = math.sqrt(6 / (patch + width))
        device = next(model.parameters()).device
        self.prompts = nn.Parameter(torch.empty(len(blocks), num_prompts, width, device=device).uniform_(-bound, bound))
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(self.insert(index))
        blocks[-1].register_forward_hook(self.remove)

    def insert(self, index: int) -> Any:
        """A hook that puts the prompts of a block behind the first token, in place of those of the block before."""

        def hook(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens, *others = arguments
            prompts = self.prompts[index].to(tokens.dtype).expand(len(tokens), -1, -1)
            patches = tokens[:, 1 + (self.prompts.shape[1] if index else 0) :]
            return (torch.cat((tokens[:, :1], prompts, patches), dim=1), *others)

        return hook

    def remove(self, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        """A hook that takes the prompts out of what the last block returns."""

        def without(tokens: Tensor) -> Tensor:
            return torch.cat((tokens[:, :1], tokens[:, 1 + self.prompts.shape[1] :]), dim=1)

        return (without(output[0]), *output[1:]) if isinstance(output, tuple) else without(output)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)
