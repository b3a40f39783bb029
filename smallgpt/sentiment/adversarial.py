"""Adversarial training: every text is also learnt with its token embeddings perturbed a little, in
the direction that raises its loss most, so that a small change of what is read does not change the
answer (Miyato, Dai and Goodfellow 2017, Adversarial training methods for semi-supervised text
classification). The two losses have equal weight. Unlike there, the embeddings are not normalised:
the perturbation is measured in their norm before fine-tuning.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def typical_norm(embedding: nn.Embedding) -> float:
    """The median norm of a token's embedding, of one that lies whole on this process."""
    return float(embedding.weight.detach().norm(dim=1).median())


class Adversary:
    """Watches the output (B, T, C) of an embedding in a plain pass and perturbs it in a second one:
    each text's (T, C) by this L2 norm. norm=0: nothing is watched.

    A text is perturbed along its own gradient alone, so batches may be cut and shared in any way.
    """

    def __init__(self, embedding: nn.Embedding, norm: float):
        self.norm = norm
        self.output: Tensor | None = None  # of the plain pass; holds its gradient after backward
        self.perturbation: Tensor | None = None  # what the second pass adds to it
        if norm:
            embedding.register_forward_hook(self.watch)

    def watch(self, embedding: nn.Embedding, args: tuple, output: Tensor) -> Tensor:
        """The forward hook of the embedding."""
        if self.perturbation is not None:
            return output + self.perturbation
        if output.requires_grad:
            output.retain_grad()
            self.output = output
        return output

    @contextmanager
    def perturbing(self) -> Iterator[None]:
        """Forward passes inside are perturbed along the gradient of the last plain one."""
        self.perturbation = self.norm * self.direction(self.output.grad)
        self.output = None
        try:
            yield
        finally:
            self.perturbation = None

    @staticmethod
    def direction(gradient: Tensor) -> Tensor:
        """The gradient (B, T, C), each text's with an L2 norm of 1.

        It is scaled by its largest entry first: of a text that is learnt already the gradient is
        tiny, and its squares would vanish."""
        smallest = torch.finfo(gradient.dtype).tiny
        largest = gradient.abs().amax((1, 2), keepdim=True).clamp(min=smallest)
        return F.normalize((gradient / largest).flatten(1)).view_as(gradient)
