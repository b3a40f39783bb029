"""Adversarial training: every text is also learnt with its token embeddings perturbed a little, in the direction that
raises its loss most, so that a small change of what is read does not change the answer (Miyato, Dai and Goodfellow
2017, Adversarial training methods for semi-supervised text classification). The two losses have equal weight. Unlike
there, the embeddings are not normalised: instead the perturbation is measured in their norm before fine-tuning.
"""

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Adversary:
    """Watches the output (B, T, C) of an embedding and, in a second pass, perturbs it: each text's (T, C) by an L2 norm
    of epsilon times the median norm of a token's embedding when this was made. epsilon=0: there is no second pass.

    A text is perturbed along its own gradient alone, so batches may be cut and shared in any way."""

    def __init__(self, embedding: nn.Embedding, epsilon: float):
        self.epsilon = epsilon
        self.output: Tensor | None = None  # of the plain pass
        self.perturbation: Tensor | None = None  # what the second pass adds to it
        if epsilon:
            self.norm = epsilon * float(embedding.weight.detach().norm(dim=1).median())
            embedding.register_forward_hook(self._watch)

    def _watch(self, embedding: nn.Embedding, args: tuple, output: Tensor) -> Tensor:
        if self.perturbation is not None:
            return output + self.perturbation
        if output.requires_grad:
            output.retain_grad()
            self.output = output
        return output

    def passes(self) -> Iterator[tuple[bool, bool]]:
        """(is it perturbed?, is it the last one?) of the passes over one micro-batch. The caller runs forward and
        backward in each; the gradients add up."""
        yield False, not self.epsilon
        if self.epsilon:
            grad = self.output.grad
            # of a text that is learnt already the gradient is tiny, and its squares would vanish
            grad = grad / grad.abs().amax((1, 2), keepdim=True).clamp(
                min=torch.finfo(grad.dtype).tiny
            )
            self.perturbation = self.norm * F.normalize(grad.flatten(1)).view_as(grad)
            self.output = None
            yield True, True
            self.perturbation = None
