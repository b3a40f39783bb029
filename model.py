"""Everything that has weights: a GPT, its KV cache, its language-model loss and its classification head.

`GPTConfig` chooses between the GPT-2 form (learned positions, LayerNorm, GELU: equal to Hugging Face's GPT-2 with the
same weights) and modern parts, each by its own field (equal to Hugging Face's Qwen3). Imports torch only.

Shapes: B batch, T positions, C = n_embd, H heads, K key/value heads, D = C / H head size, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1  # target of a position that has nothing to predict


@dataclass
class GPTConfig:
    vocab_size: int = (
        0  # rows of the embedding; 0 = the tokenizer's size, rounded up to a multiple of 64
    )
    block_size: int = 256  # longest sequence, in tokens
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_kv_head: int = 0  # key/value heads (grouped-query attention); 0 = n_head
    n_embd: int = 768  # width of the residual stream
    pos: Literal["learned", "rope"] = "rope"  # position information
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"  # normalisation before each sub-layer
    mlp: Literal["gelu", "relu2", "swiglu"] = "relu2"  # activation of the MLP
    qk_norm: bool = True  # RMSNorm on queries and keys
    bias: bool = False  # biases in the linear layers and LayerNorm
    tie_weights: bool = True  # one matrix for the token embedding and the LM head
    dropout: float = 0.0  # on the embedding, the attention weights and each sub-layer's output
    rope_base: float = 10000.0  # base of the rotary frequencies

    def check(self) -> list[str]:
        """Problems with these settings, in plain words; empty when there are none."""
        heads, kv = max(1, self.n_head), self.n_kv_head or max(1, self.n_head)
        sizes, size = ("block_size", "n_layer", "n_head", "n_embd"), self.n_embd // heads
        wrong = {
            f"{name}={getattr(self, name)} must be at least 1": getattr(self, name) < 1
            for name in sizes
        } | {
            f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}": self.n_embd % heads,
            f"n_head={self.n_head} is not divisible by n_kv_head={kv}": kv < 1 or heads % kv,
            f"rotary positions need an even head size, n_embd/n_head is {size}": size % 2
            and self.pos == "rope",
            f"dropout={self.dropout} must be in [0, 1)": not 0.0 <= self.dropout < 1.0,
        }
        return [problem for problem, found in wrong.items() if found]


class KVCache:
    """Keys and values k, v (n_layer, B, K, block_size, D) of what was read so far. It holds no position: the caller
    says where a piece of text starts, and taking back a turn is a smaller number."""

    def __init__(self, c: GPTConfig, batch: int, weight: Tensor):
        shape = (c.n_layer, batch, c.n_kv_head or c.n_head, c.block_size, c.n_embd // c.n_head)
        self.k, self.v = weight.new_zeros(2, *shape)

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) of positions start..start+T; return those of positions 0..start+T."""
        end = start + k.size(2)
        self.k[layer, :, :, start:end], self.v[layer, :, :, start:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class RMSNorm(nn.RMSNorm):
    """In the precision of its input: the fused kernel wants the weight in the same, which autocast does not see to."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(c: GPTConfig) -> nn.Module:
    return (
        RMSNorm(c.n_embd, eps=1e-6) if c.norm == "rmsnorm" else nn.LayerNorm(c.n_embd, bias=c.bias)
    )


def rotary(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., T, D) of rotary positions (..., T) (Su et al. 2021), float32: bf16 has no 257."""
    exponent = (
        torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    )
    angle = (positions[..., None].float() * base**-exponent).repeat(*[1] * positions.dim(), 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head of x (B, H, T, D) by the angles of its position."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention through PyTorch's fused kernels, with optional rotary positions, QK-norm and GQA."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size, self.dropout = config.n_embd // config.n_head, config.dropout
        # three matrices, not one: each is a whole for tensor parallel and for Muon's orthogonalisation
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = nn.Linear(config.n_embd, self.n_kv_head * self.head_size, bias=config.bias)
        self.v = nn.Linear(config.n_embd, self.n_kv_head * self.head_size, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_size, eps=1e-6) if config.qk_norm else None for _ in range(2)
        )

    def forward(self, x: Tensor, ctx: "Context") -> Tensor:
        # q (B, H, T, D); k, v (B, K, T, D)
        q, k, v = (
            f(x).unflatten(2, (-1, self.head_size)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if ctx.rotary is not None:
            q, k = rotate(q, *ctx.rotary), rotate(k, *ctx.rotary)
        if ctx.cache is not None:
            k, v = ctx.cache.write(ctx.layer, ctx.start, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=ctx.mask,
            is_causal=ctx.mask is None and x.size(1) > 1,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """4 C wide with GELU (tanh form, as GPT-2) or squared ReLU (So et al. 2021); or SwiGLU (Shazeer 2020), which has a
    third matrix and is therefore 8/3 C wide, rounded up to a multiple of 64."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind, C = config.mlp, config.n_embd
        hidden = 64 * math.ceil(C / 24) if self.kind == "swiglu" else 4 * C
        self.fc = nn.Linear(config.n_embd, hidden, bias=config.bias)
        self.gate = (
            nn.Linear(config.n_embd, hidden, bias=config.bias) if config.mlp == "swiglu" else None
        )
        self.proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.kind == "swiglu":
            return self.proj(F.silu(self.gate(x)) * h)
        return self.proj(
            F.relu(h).square() if self.kind == "relu2" else F.gelu(h, approximate="tanh")
        )


@dataclass
class Context:
    """What all blocks of one forward pass share."""

    rotary: (
        tuple[Tensor, Tensor] | None
    )  # cosines and sines (1 or B, 1, T, D) of this pass's positions
    mask: Tensor | None  # (B or 1, 1, T, keys) True = may look; None = plain causal
    cache: KVCache | None
    start: int  # position of the first token of this pass
    layer: int = 0  # of the block that is running; here, so that one compiled block serves for all


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.norm1, self.attn = make_norm(config), Attention(config)
        self.norm2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: Tensor, ctx: Context, at: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x), ctx))
        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at][:, None]  # (B, 1, C)
        return x + self.drop(self.mlp(self.norm2(x)))


def softmax_slice(logits: Tensor, targets: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of logits (N, V) in precision acc, and its gradient (N, V) in that of the logits."""
    logits, dtype = logits.to(acc), logits.dtype
    valid, index = (targets != IGNORE)[:, None], targets.clamp(min=0)[:, None]
    log_z = logits.logsumexp(dim=-1, keepdim=True)
    loss = ((log_z - logits.gather(1, index)) * valid).sum()
    hit = torch.arange(logits.size(1), device=logits.device) == index
    return loss, (((logits - log_z).exp() - hit.to(acc)) * valid).to(dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of h @ weight.T against targets, a slice of rows at a time: its logits become their own
    gradient while they are in the cache, and of a large (N, V) only a slice ever exists (the idea of Liger-Kernel).
    h (N, C), weight (V, C), targets (N,); returns a float32 (or float64) scalar."""

    @staticmethod
    def forward(
        ctx, h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, softmax
    ) -> Tensor:
        rows = max(64, (2**22 if h.device.type == "cpu" else 2**25) // weight.size(0))
        acc = torch.float64 if h.dtype == torch.float64 else torch.float32
        w, total = weight.to(dtype), torch.zeros((), device=h.device, dtype=acc)
        grad_h, grad_w = torch.empty_like(h), torch.zeros_like(weight, dtype=acc)
        with torch.autocast(h.device.type, enabled=False):
            for x, t, grad_x in zip(
                h.to(dtype).split(rows), targets.split(rows), grad_h.split(rows), strict=True
            ):
                loss, grad = softmax(x @ w.T, t, acc)
                total += loss
                if any(ctx.needs_input_grad):
                    grad_x.copy_(grad @ w)
                    grad_w += grad.T @ x
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(g * grad for g in ctx.saved_tensors), None, None, None


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.vocab_size > 0, "GPTConfig.vocab_size must be set before the model is built"
        self.config, self.softmax_slice = config, softmax_slice
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = (
            nn.Embedding(config.block_size, config.n_embd) if config.pos == "learned" else None
        )
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: embeddings, lm_head and linear weights normal(0, 0.02), but those that write into the residual
        stream (attn.proj, mlp.proj) normal(0, 0.02 / sqrt(2 n_layer)); biases 0; norms 1."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p,
                    std=0.02
                    / math.sqrt(2 * self.config.n_layer if name.endswith("proj.weight") else 1),
                )
            else:
                nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)

    def new_cache(self, batch: int = 1) -> KVCache:
        """An empty cache of block_size positions, beside the weights and in their precision."""
        return KVCache(self.config, batch, self.wte.weight.detach())

    def trunk(
        self,
        x: Tensor,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        start: int = 0,
        layers: slice = slice(None),
        norm: bool = True,
        at: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm, of tokens x (B, T) at positions start..start+T. segments
        (B, T): numbers of the texts packed into a row; a position sees only its own text and counts from its beginning.
        cache: keys and values of positions 0..start, to which these are added. layers, norm: only some blocks, without
        the norm; x may be the hidden states (B, T, C) that go into them. at (B,): the one position of each row that is
        wanted, (B, 1, C), where the last block is among the layers: its MLP, two thirds of it, then reads no other."""
        c, T = self.config, x.size(1)
        assert start + T <= c.block_size, f"{start + T} tokens exceed block_size={c.block_size}"
        position, mask = torch.arange(start, start + T, device=x.device), None
        if segments is not None:
            begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            position = position - torch.where(begins, position, 0).cummax(dim=1).values  # (B, T)
            mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
        elif cache is not None and start > 0 and T > 1:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)[
                None, None
            ]
        if x.dim() == 2:
            x = self.drop(self.wte(x) if self.wpe is None else self.wte(x) + self.wpe(position))
        turn = (
            rotary(position.view(-1, 1, T), c.n_embd // c.n_head, c.rope_base)
            if self.wpe is None
            else None
        )
        ctx = Context(turn, mask, cache, start)
        for ctx.layer in range(c.n_layer)[layers]:
            x = self.blocks[ctx.layer](x, ctx, at if ctx.layer == c.n_layer - 1 else None)
        return self.norm(x) if norm else x

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """SUM of the token losses in nats of targets (B, T), IGNORE where there is none, given the hidden states h. The
        caller divides once by the valid targets of the whole step, so that padding, packing, accumulation and the
        number of processes cannot bias the mean."""
        kind, weight = (
            h.device.type,
            self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach(),
        )
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return LinearCrossEntropy.apply(
            h.flatten(0, 1), weight, targets.flatten(), dtype, self.softmax_slice
        )

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V); or, given targets (B, T), their summed loss."""
        h = self.trunk(idx, segments)
        return self.lm_head(h) if targets is None else self.loss(h, targets)

    def compile_parts(self) -> None:
        """torch.compile, one block compiled once and used for all: a third of the whole model's compile time."""
        for block in self.blocks:
            block.compile()
        self.softmax_slice = torch.compile(softmax_slice)


class GPTClassifier(nn.Module):
    """A GPT's trunk and a linear head on one hidden state per text: that of the last token, or the mean of all. mask:
    of the real tokens; else padding is read like text to the end of the row, which must be block_size long."""

    def __init__(
        self, gpt: GPT, n_classes: int, pool: Literal["last", "mean"] = "last", mask: bool = True
    ):
        super().__init__()
        self.gpt, self.pool, self.mask, self.first_block = (
            gpt,
            pool,
            mask,
            0,
        )  # trained from block 0 on
        self.head = nn.Linear(gpt.config.n_embd, n_classes, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def pooled(self, h: Tensor, lengths: Tensor) -> Tensor:
        """The last real one of hidden states h (B, T, C), or their mean (B, C). What is padded changes neither."""
        at, end = (
            torch.arange(h.size(1), device=h.device),
            lengths[:, None] if self.mask else h.size(1),
        )
        keep = (at == end - 1 if self.pool == "last" else at < end).expand(h.shape[:2])  # (B, T)
        return (h * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)

    def forward(
        self, x: Tensor, lengths: Tensor, targets: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores (B, n_classes) of texts x (B, T), padded on the right, of which lengths (B,) are real; given targets
        (B, T), also the summed language-model loss (Radford et al. 2018). x may be what the blocks below first_block
        made of the texts, hidden states (B, T, C), or what is pooled of the last ones (B, C)."""
        if (made := x.is_floating_point()) and x.dim() == 2:
            return self.head(x)
        at = lengths - 1 if self.pool == "last" and self.mask and targets is None else None
        h = self.gpt.trunk(x, layers=slice(self.first_block if made else 0, None), at=at)
        scores = self.head(self.pooled(h, lengths) if at is None else h[:, 0])
        return scores if targets is None else (scores, self.gpt.loss(h, targets))
