"""A GPT that knows which token follows which before its first step of training.

How likely a token is after another one can be counted: a pass over the text, no gradients. The
first minutes of a pretraining are spent on learning just that. So the counts are factorised into
the token embedding and the LM head, as word vectors are made (Levy and Goldberg 2014: factors of
the matrix of pointwise mutual information). The blocks begin with zeros where they write into the
residual stream, and the whole model begins as a bigram model of low rank.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from model import GPT, IGNORE
from smallgpt.text.batches import Corpus

COUNTED = 2**24  # training tokens that are counted, at most
AT_ONCE = 2**21  # of them in memory
SMOOTHING = 5.0  # occurrences that every token is given, spread like the tokens of the whole text
CONSTANT = 0.2  # share of an embedding's squared length that is the same for all tokens
ASSOCIATION = 0.75  # share, at most, that tells what follows
OVERSAMPLING = 16  # further columns of the randomised factorisation


@dataclass(frozen=True)
class Pairs:
    """Tokens first[i], second[i] followed each other count[i] times; all (N,), each pair once."""

    first: Tensor
    second: Tensor
    count: Tensor


def begin_with_bigrams(model: GPT, corpus: Corpus, seed: int) -> str:
    """Make a new GPT, on the CPU and with an LM head of its own, a bigram model of the batches that
    the training of this seed reads. Returns what was done, in words."""
    V, C = model.wte.weight.shape
    dtype = model.wte.weight.dtype
    generator = torch.Generator().manual_seed(seed)
    pairs = count_pairs(corpus, seed, V)
    embedding, head = factorise(pairs, V, C, dtype, generator)
    with torch.no_grad():
        model.wte.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):
                p.zero_()
    n_pairs = len(pairs.count)
    return f"begins with {n_pairs:,} pairs of tokens, counted in the training text"


def count_pairs(corpus: Corpus, seed: int, vocab_size: int) -> Pairs:
    """How often each token follows each in the first batches, of an epoch at most."""
    wanted = math.ceil(COUNTED / corpus.block_size)
    n_rows = min(corpus.blocks_per_epoch, wanted)
    rows_at_once = max(1, AT_ONCE // corpus.block_size)
    found = []
    counts = []
    for begin in range(0, n_rows, rows_at_once):
        end = min(begin + rows_at_once, n_rows)
        x, y = corpus.train_batch(range(begin, end), seed)
        is_pair = y != IGNORE
        first = x[is_pair]
        second = y[is_pair]
        number = first * vocab_size + second
        number, count = number.unique(return_counts=True)
        found.append(number)
        counts.append(count)
    all_found = torch.cat(found)
    all_counts = torch.cat(counts)
    number, place = all_found.unique(return_inverse=True)
    count = torch.zeros_like(number)
    count.index_add_(0, place, all_counts)
    first = number // vocab_size
    second = number % vocab_size
    return Pairs(first, second, count)


def factorise(
    pairs: Pairs, vocab_size: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Embedding and LM head, both (V, C) = (vocab_size, width), whose logits are those of a bigram
    model: head @ embedding[a] = log p(b) + what a tells of b, but for a constant.

    Two of the C coordinates are taken: one of the embedding is constant and carries log p(b); one
    fills each row up to length sqrt(C), so that the final norm leaves it as it is."""
    count = pairs.count.to(dtype)
    zeros = torch.zeros(vocab_size, dtype=dtype)
    n_first = zeros.index_add(0, pairs.first, count)  # (V,)
    n_second = zeros.index_add(0, pairs.second, count)
    smoothed = n_second + 0.5
    frequency = smoothed / smoothed.sum()
    rank = min(width - 2, vocab_size)
    left, right = associations(pairs, count, n_first, n_second, frequency, rank, generator)

    # few rows are much longer than the others: these are shortened to what 98 % have
    lengths = left.norm(dim=1, keepdim=True)
    longest = lengths.quantile(0.98)
    shortening = longest / lengths
    left = left * shortening.clamp(max=1)
    scale = math.sqrt(ASSOCIATION * width) / longest
    constant = math.sqrt(CONSTANT * width)
    log_frequency = frequency.log()
    log_frequency -= log_frequency.mean()  # softmax ignores it

    last = 2 + rank
    embedding = torch.zeros(vocab_size, width, dtype=dtype)
    embedding[:, 0] = constant
    embedding[:, 2:last] = left * scale
    squares = embedding.square()
    missing = width - squares.sum(dim=1)
    embedding[:, 1] = missing.sqrt()
    head = torch.zeros(vocab_size, width, dtype=dtype)
    head[:, 0] = log_frequency / constant
    head[:, 2:last] = right / scale
    # turned at random: no coordinate differs from the others, as the norms and Adam expect
    random = torch.randn(width, width, dtype=dtype, generator=generator)
    turn, _ = torch.linalg.qr(random)
    return embedding @ turn, head @ turn


def associations(
    pairs: Pairs,
    count: Tensor,
    n_first: Tensor,
    n_second: Tensor,
    frequency: Tensor,
    rank: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Factors (V, rank) of the positive pointwise mutual information of the pairs, smoothed: left
    of the first token, right of the second. What is frequent is fitted best."""
    expected = frequency[pairs.second]  # of the second token, whatever is before it
    n_before = n_first[pairs.first] + SMOOTHING
    given = (count + SMOOTHING * expected) / n_before
    ratio = given / expected
    information = ratio.log().clamp(min=0)
    weight_first = fitting_weight(n_first)
    weight_second = fitting_weight(n_second)
    weighted = information * weight_first[pairs.first] * weight_second[pairs.second]
    V = len(frequency)
    matrix = torch.sparse_coo_tensor(
        torch.stack([pairs.first, pairs.second]),
        weighted,
        (V, V),
        is_coalesced=True,
        check_invariants=False,
    )
    left, right = low_rank(matrix, rank, generator)
    return left / weight_first[:, None], right / weight_second[:, None]


def fitting_weight(occurrences: Tensor) -> Tensor:
    """How much the fit of each token counts (V,), by its occurrences."""
    relative = occurrences / occurrences.mean()
    return (relative + 1e-3).sqrt()


def low_rank(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two matrices, (A, rank) and (B, rank), with left @ right.T near the sparse matrix (A, B): its
    largest singular values, shared equally (Halko, Martinsson and Tropp 2011, algorithm 4.4 with
    two iterations)."""
    rows = compressed(matrix)
    columns = compressed(matrix.t().coalesce())  # its transpose
    A, B = matrix.shape
    n_columns = min(rank + OVERSAMPLING, A, B)
    start = torch.randn(B, n_columns, dtype=matrix.dtype, generator=generator)
    basis = orthonormal(rows @ start)
    for _ in range(2):
        basis = orthonormal(rows @ (columns @ basis))
    small = columns @ basis  # (B, n_columns)
    u, values, vt = torch.linalg.svd(small.T, full_matrices=False)
    left = basis @ u[:, :rank]
    right = vt[:rank].T
    root = values[:rank].sqrt()
    return left * root, right * root


def compressed(matrix: Tensor) -> Tensor:
    """A sparse matrix by its rows: it multiplies seven times as fast as its coordinates do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the matrix's columns."""
    basis, _ = torch.linalg.qr(matrix)
    return basis
