"""Adversarial training: every text is also learnt with its token embeddings moved a little, in the direction that
raises its loss most, so that a small change of what is read does not change the answer (Miyato, Dai and Goodfellow
2017, Adversarial training methods for semi-supervised text classification).
"""

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor


class Adversary:
    """Watches what an embedding gives, and moves it in a second pass: a text's embeddings (T, C) together by `size`
    times the length that a token's embedding has before fine-tuning (the median of all). 0 = there is no second pass.

    A row of the batch is moved by its own gradient alone, so batches may be cut and shared in any way."""

    def __init__(self, embedding: nn.Embedding, size: float):
        self.size, self.seen, self.move = size, None, None
        if size:
            self.distance = size * float(embedding.weight.detach().norm(dim=1).median())
            embedding.register_forward_hook(self._watch)

    def _watch(self, embedding: nn.Embedding, args: tuple, out: Tensor) -> Tensor:
        if self.move is not None:
            return out + self.move
        if out.requires_grad:
            out.retain_grad()
            self.seen = out
        return out

    def passes(self) -> Iterator[tuple[bool, bool]]:
        """(is it attacked?, is it the last one?) of the passes over one micro-batch. The caller runs forward and
        backward in each; the gradients add up."""
        yield False, not self.size
        if self.size:
            grad = self.seen.grad
            norm = grad.flatten(1).norm(dim=1).clamp(min=torch.finfo(grad.dtype).tiny)
            self.move, self.seen = self.distance * grad / norm[:, None, None], None
            yield True, True
            self.move = None
