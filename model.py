"""Everything that has weights: a GPT, its KV cache, its language-model loss and its classifier.

`GPTConfig` chooses between the GPT-2 form (learned positions, LayerNorm, GELU: equal to Hugging
Face's GPT-2 with the same weights) and modern parts, each by its own field (equal to Hugging
Face's Qwen3). Imports torch only.

It reads from top to bottom: the parts of a block, the GPT, the classifier. The last two sections
are about memory and time: they compute the loss without ever holding all logits.

Shapes: B batch, T positions, C = n_embd, H heads, K key/value heads, D = C / H head size,
V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -1  # target of a position that has nothing to predict


@dataclass
class GPTConfig:
    vocab_size: int = 0  # rows of the embedding; 0 = the tokenizer's size, up to a multiple of 64
    block_size: int = 256  # longest sequence, in tokens
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_kv_head: int = 0  # key/value heads (grouped-query attention); 0 = n_head
    n_embd: int = 768  # width of the residual stream
    pos: Literal["learned", "rope"] = "rope"  # position information
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"  # normalisation before each sub-layer
    norm_eps: float = 0.0  # added to the variance; 0 = 1e-6 for RMSNorm, 1e-5 for LayerNorm
    mlp: Literal["gelu", "relu2", "swiglu"] = "relu2"  # activation of the MLP
    mlp_width: int = 0  # hidden units of the MLP; 0 = 4 n_embd, or 8/3 n_embd with swiglu
    qk_norm: bool = True  # RMSNorm on queries and keys
    bias: bool = False  # biases in the linear layers and LayerNorm
    tie_weights: bool = True  # one matrix for the token embedding and the LM head
    dropout: float = 0.0  # on the embedding, the attention weights and each sub-layer's output
    rope_base: float = 10000.0  # base of the rotary frequencies

    @property
    def kv_heads(self) -> int:
        """Key/value heads; without grouped-query attention as many as there are heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """Width of the MLP: 4 C, or with SwiGLU's third matrix 8/3 C, up to a multiple of 64."""
        if self.mlp_width:
            return self.mlp_width
        if self.mlp == "swiglu":
            eight_thirds = 8 * self.n_embd / 3
            return 64 * math.ceil(eight_thirds / 64)
        return 4 * self.n_embd

    def check(self) -> list[str]:
        """Problems with these settings, in plain words; empty when there are none."""
        problems = []
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("norm_eps", "mlp_width"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)} must not be negative")
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout={self.dropout} must be in [0, 1)")
        if self.n_head < 1:
            return problems  # nothing can be divided by it
        if self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            problems.append(f"n_head={self.n_head} is not divisible by n_kv_head={self.kv_heads}")
        if self.pos == "rope" and self.head_size % 2:
            problems.append(
                f"rotary positions need an even head size, n_embd/n_head is {self.head_size}"
            )
        return problems


# --- norms and rotary positions -------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich 2019), in the precision of x.

    PyTorch's fused kernel wants the weight in the precision of x, and has its sums in float32
    anyway. A GPU's autocast would turn all of x into float32 first, which takes time."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / std(x) * weight + bias (Ba et al. 2016), in the precision of x.

    The weight need not be in it: with FSDP it is bf16 beside a float32 stream."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = None
        if self.bias is not None:
            bias = self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def make_norm(c: GPTConfig) -> nn.Module:
    if c.norm == "rmsnorm":
        eps = c.norm_eps or 1e-6
        return RMSNorm(c.n_embd, eps=eps)
    eps = c.norm_eps or 1e-5
    return LayerNorm(c.n_embd, eps=eps, bias=c.bias)


def rotary(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., T, D) of rotary positions (..., T) (Su et al. 2021).

    They are float32: bf16 cannot hold the position 257."""
    pairs = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    exponents = -(pairs / head_size)  # (D / 2,) from 0 to almost -1
    frequencies = base**exponents
    angles = positions[..., None].float() * frequencies  # (..., T, D / 2)
    both_halves = torch.cat((angles, angles), dim=-1)  # (..., T, D)
    return both_halves.cos(), both_halves.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, D): numbers i and i + D/2 of a head are a point in a plane, which turns by
    the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    rotated = x * cos + quarter_turn * sin
    return rotated.to(x.dtype)


# --- a block --------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of what was read so far: a new token then costs its own attention only.

    k, v (n_layer, B, K, length, D). It holds no position: the caller names where a piece of text
    starts, in all rows or in each, and taking back a turn is a smaller number."""

    def __init__(self, c: GPTConfig, batch: int, length: int, weight: Tensor):
        """It lies beside `weight` and has its precision."""
        shape = (c.n_layer, batch, c.kv_heads, length, c.head_size)
        self.k = weight.new_zeros(shape)
        self.v = weight.new_zeros(shape)

    def write(
        self,
        layer: int,
        positions: Tensor,
        end: int,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's k, v (B, K, T, D) of these positions, (T,) in all rows or (B, T) in each,
        of which the last is end - 1; return those of 0..end."""
        keys = store(self.k[layer], positions, end, k)
        values = store(self.v[layer], positions, end, v)
        return keys, values


def store(cache: Tensor, positions: Tensor, end: int, new: Tensor) -> Tensor:
    """Put `new` (B, K, T, D) into one layer's cache (B, K, length, D), as KVCache.write does."""
    is_aligned = positions.dim() == 1
    if is_aligned:
        start = end - new.size(2)
        cache[:, :, start:end] = new
    else:
        by_position = cache.transpose(1, 2)  # (B, length, K, D), a view
        rows = torch.arange(len(positions), device=positions.device)
        new = new.transpose(1, 2)  # (B, T, K, D)
        by_position[rows[:, None], positions] = new.to(cache.dtype)
    return cache[:, :, :end]


@dataclass
class Context:
    """What all blocks of one forward pass share."""

    positions: Tensor  # (T,), or (B, T) where texts are packed or rows start apart
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines (1 or B, 1, T, D) of the positions
    mask: Tensor | None  # (1 or B, 1, T, keys), True = may look; None = plain causal
    cache: KVCache | None = None
    end: int = 0  # the last position of this pass is end - 1


class Attention(nn.Module):
    """Causal self-attention, softmax(q k^T / sqrt(D)) v in each head (Vaswani et al. 2017).

    Optional are rotary positions, QK-norm (Henry et al. 2020), and grouped queries (Ainslie et al.
    2023): H / K heads share their keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.head_size
        self.grouped = config.kv_heads != config.n_head
        self.dropout = config.dropout
        C = config.n_embd
        kv_size = config.kv_heads * config.head_size
        # three matrices, not one: Muon updates each by itself, tensor parallelism cuts each
        self.q = nn.Linear(C, C, bias=config.bias)
        self.k = nn.Linear(C, kv_size, bias=config.bias)
        self.v = nn.Linear(C, kv_size, bias=config.bias)
        self.proj = nn.Linear(C, C, bias=config.bias)
        self.q_norm = None
        self.k_norm = None
        if config.qk_norm:
            eps = config.norm_eps or 1e-6
            self.q_norm = RMSNorm(self.head_size, eps=eps)
            self.k_norm = RMSNorm(self.head_size, eps=eps)
        # tensor parallelism puts another in its place, whose dropout differs by rank
        self.attend = F.scaled_dot_product_attention

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)"""
        heads = x.unflatten(2, (-1, self.head_size))
        return heads.transpose(1, 2)

    def forward(self, x: Tensor, context: Context, layer: int) -> Tensor:
        q = self.split_heads(self.q(x))  # (B, H, T, D)
        k = self.split_heads(self.k(x))  # (B, K, T, D)
        v = self.split_heads(self.v(x))  # (B, K, T, D)
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if context.rotary is not None:
            q = rotate(q, *context.rotary)
            k = rotate(k, *context.rotary)
        if context.cache is not None:
            k, v = context.cache.write(layer, context.positions, context.end, k, v)
        is_causal = context.mask is None and x.size(1) > 1  # a single query may look at all keys
        y = self.attend(
            q,
            k,
            v,
            attn_mask=context.mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=bool(is_causal),  # torch.export makes a SymBool of it
            enable_gqa=self.grouped,
        )  # (B, H, T, D)
        joined = y.transpose(1, 2).flatten(2)  # (B, T, C)
        return self.proj(joined)


class MLP(nn.Module):
    """Two matrices with GELU (tanh form, as GPT-2) or squared ReLU (So et al. 2021) between them;
    or three as SwiGLU (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        C = config.n_embd
        hidden = config.mlp_size
        self.fc = nn.Linear(C, hidden, bias=config.bias)
        self.gate = None
        if self.kind == "swiglu":
            self.gate = nn.Linear(C, hidden, bias=config.bias)
        self.proj = nn.Linear(hidden, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.kind == "swiglu":
            h = F.silu(self.gate(x)) * h
        elif self.kind == "relu2":
            h = F.relu(h)
            h = h * h  # autocast on a GPU would take square() in float32
        else:
            h = F.gelu(h, approximate="tanh")
        return self.proj(h)


def take_position(x: Tensor, at: Tensor) -> Tensor:
    """Of each row of x (B, T, C) the position named by at (B,), as (B, 1, C)."""
    rows = torch.arange(x.size(0), device=x.device)
    taken = x[rows, at]  # (B, C)
    return taken[:, None]


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.drop = nn.Dropout(config.dropout)
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        context: Context,
        layer: int,
        at: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        at (B,): only this position of each row is wanted, (B, 1, C). The MLP, two thirds of the
        work, then reads no other."""
        attended = self.attn(self.norm1(x), context, layer)
        x = x + self.drop(attended)
        if at is not None:
            x = take_position(x, at)
        changed = self.mlp(self.norm2(x))
        return x + self.drop(changed)


# --- the model ------------------------------------------------------------------------------------


def positions_in_texts(segments: Tensor) -> Tensor:
    """Positions (B, T) that count from the beginning of each text, given the numbers (B, T) of the
    texts packed into a row: of 7 7 7 8 8 they are 0 1 2 0 1."""
    positions = torch.arange(segments.size(1), device=segments.device)
    changes = segments[:, 1:] != segments[:, :-1]
    begins = F.pad(changes, (1, 0), value=True)
    latest_begin, _ = torch.where(begins, positions, 0).cummax(dim=1)
    return positions - latest_begin


def detach_where(frozen: Tensor, x: Tensor) -> Tensor:
    """The same x (..., C), but no gradient flows into the rows of it that are frozen (...)."""
    return torch.where(frozen[..., None], x.detach(), x)


class GPT(nn.Module):
    """Token ids in, logits or the language-model loss out (Radford et al. 2019)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.vocab_size > 0, "GPTConfig.vocab_size must be set before the model is built"
        self.config = config
        C = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = None
        if config.pos == "learned":
            self.wpe = nn.Embedding(config.block_size, C)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.tie()
        self.init_weights()
        # how it trains, which is not part of what it is
        self.recompute = 0  # every n-th block keeps no activations; 0 = all keep them
        self.negatives = 0  # classes that the loss samples in training; 0 = it reads all
        self.first_trained_row = 0  # token embeddings below it are frozen
        self.slice_loss = cross_entropy_slice  # or the same, compiled

    def tie(self) -> None:
        """Make one matrix of token embedding and LM head again, where the config wants it (Press
        and Wolf 2017): moving the model to another kind of device makes two."""
        if self.config.tie_weights:
            self.lm_head.weight = self.wte.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: embeddings, lm_head and linear weights normal(0, 0.02), but those that write
        into the residual stream (attn.proj, mlp.proj) normal(0, 0.02 / sqrt(2 n_layer)); biases 0;
        norms 1."""
        additions = 2 * self.config.n_layer  # of attention and MLP to the residual stream
        for name, p in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(additions))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); or, given targets (B, T), their summed loss.

        segments as in `context`."""
        h = self.trunk(tokens, segments)
        if targets is None:
            return self.lm_head(h)
        return self.loss(h, targets)

    def trunk(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final norm, of tokens (B, T) at positions
        start..start+T; segments, cache and start as in `context`."""
        context = self.context(tokens, segments, cache, start)
        x = self.embed(tokens, context)
        x = self.run_blocks(x, context)
        return self.norm(x)

    def context(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        start: int | Tensor = 0,
    ) -> Context:
        """What the blocks share in a pass over tokens (B, T), or over hidden states (B, T, C) that
        were made of them, at positions start..start+T.

        segments (B, T): numbers of the texts packed into a row; a position sees only its own text
        and counts from its beginning. cache: keys and values of positions 0..start, to which
        those of this pass are added. start (B,): each row has its own."""
        T = tokens.size(1)
        device = tokens.device
        if isinstance(start, Tensor):
            end = int(start.max()) + T
            positions = start[:, None] + torch.arange(T, device=device)  # (B, T)
        else:
            end = start + T
            positions = torch.arange(start, end, device=device)  # (T,)
        assert end <= self.config.block_size, (
            f"{end} tokens exceed block_size={self.config.block_size}"
        )
        mask = None
        if segments is not None:
            positions = positions_in_texts(segments)  # (B, T)
            of_query = segments[:, :, None]
            of_key = segments[:, None, :]
            is_same_text = of_query == of_key  # (B, T, T)
            mask = is_same_text.tril()[:, None]
        elif cache is not None and end > T and positions.numel() > 1:
            # there are more keys than queries: a kernel's own causal mask does not know the start
            keys = torch.arange(end, device=device)
            is_seen = keys <= positions[..., None]  # (T, end) or (B, T, end)
            mask = is_seen.view(-1, 1, T, end)
        angles = None
        if self.config.pos == "rope":
            for_all_heads = positions.view(-1, 1, T)  # (1 or B, 1, T)
            angles = rotary(for_all_heads, self.config.head_size, self.config.rope_base)
        return Context(positions, angles, mask, cache, end)

    def embed(self, tokens: Tensor, context: Context) -> Tensor:
        """What goes into the first block, (B, T, C), of tokens (B, T)."""
        x = self.wte(tokens)
        if self.first_trained_row:
            x = detach_where(tokens < self.first_trained_row, x)
        if self.wpe is not None:
            x = x + self.wpe(context.positions)
        return self.drop(x)

    def run_blocks(
        self,
        x: Tensor,
        context: Context,
        first: int = 0,
        end: int | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Hidden states behind blocks first..end of those x (B, T, C) that go into block `first`.

        at (B,): the one position of each row that is wanted behind the last block, (B, 1, C)."""
        last = self.config.n_layer - 1
        for layer in range(self.config.n_layer)[first:end]:
            block = self.blocks[layer]
            wanted = at if layer == last else None
            if self.recompute and layer % self.recompute == 0 and torch.is_grad_enabled():
                # backward runs the block again (Chen et al. 2016): a third more work, less memory
                x = checkpoint(block, x, context, layer, wanted, use_reentrant=False)
            else:
                x = block(x, context, layer, wanted)
        return x

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """SUM of the token losses in nats of targets (B, T), IGNORE where there is none, given the
        hidden states h (B, T, C): the cross-entropy of lm_head(h), whose logits never all exist.

        The caller divides once by the valid targets of the whole step, so that padding, packing,
        accumulation and the number of processes cannot bias the mean. In training, with
        `negatives`, it is an estimate."""
        weight = self.head_weight()
        V = weight.size(0)
        if self.first_trained_row and self.config.tie_weights:
            rows = torch.arange(V, device=h.device)
            weight = detach_where(rows < self.first_trained_row, weight)
        h = h.flatten(0, 1)
        targets = targets.flatten()
        bias = None
        if self.negatives and self.training:
            fixed = h.device.type != "cpu"
            classes, targets, bias = sample_classes(targets, V, self.negatives, fixed)
            weight = weight[classes]
        return LinearCrossEntropy.apply(h, weight, targets, self.slice_loss, bias)

    def head_weight(self) -> Tensor:
        """The matrix (V, C) of the LM head, whole. A parallel layout may gather it here."""
        weight = self.lm_head.weight
        return weight if torch.is_grad_enabled() else weight.detach()

    def new_cache(self, batch: int = 1, length: int = 0) -> KVCache:
        """An empty cache of `length` positions (0 = block_size), beside the weights and in their
        precision."""
        length = length or self.config.block_size
        return KVCache(self.config, batch, length, self.wte.weight)

    def forward_stage(
        self,
        x: Tensor | None,
        first: int,
        end: int,
        tokens: Tensor,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The part of `forward` that lies in blocks first..end, a stage of a pipeline: the first
        one embeds, the last one gives what `forward` does, the others hidden states.

        x (B, T, C): those that go into block `first`; None for the first stage."""
        context = self.context(tokens, segments)
        if first == 0:
            x = self.embed(tokens, context)
        x = self.run_blocks(x, context, first, end)
        if end < self.config.n_layer:
            return x
        h = self.norm(x)
        if targets is None:
            return self.lm_head(h)
        return self.loss(h, targets)

    def compile_parts(self) -> str:
        """torch.compile, one block compiled once and used for all: a third of the whole model's
        compile time. Returns what is compiled, in words."""
        for block in self.blocks:
            block.compile()
        self.slice_loss = torch.compile(cross_entropy_slice)
        return "on"


# --- a classifier ---------------------------------------------------------------------------------


# What a classifier is given of texts: their tokens (B, T); the hidden states (B, T, C) that its
# frozen blocks made of them; or, all blocks being frozen, what is pooled of the last ones (B, C).
Reads = Literal["tokens", "states", "pooled"]


class GPTClassifier(nn.Module):
    """A GPT's trunk and a linear head on one hidden state per text: that of the last token, or the
    mean of all (Radford et al. 2018).

    marks is for two texts with the token `sep` between: a vector is added to the embedding of each
    token, another one for tokens that the other text lacks, that it holds alone (the exact match of
    DrQA, Chen et al. 2017), that it holds with a neighbour, and so on for runs of up to `marks`
    tokens. 0 = no marks.

    mask=True pools the real tokens only; mask=False reads the padding like text to the end of the
    row, which must then be block_size long."""

    def __init__(
        self,
        gpt: GPT,
        n_classes: int,
        pool: Literal["last", "mean"] = "last",
        mask: bool = True,
        sep: int = IGNORE,
        marks: int = 0,
    ):
        super().__init__()
        self.gpt = gpt
        self.pool = pool
        self.mask = mask
        self.sep = sep
        self.first_block = 0  # the first that trains; those below are frozen
        C = gpt.config.n_embd
        self.marks = None
        if marks:
            self.marks = nn.Embedding(marks + 1, C)
            nn.init.zeros_(self.marks.weight)
        self.head = nn.Linear(C, n_classes, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor,
        targets: Tensor | None = None,
        reads: Reads = "tokens",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores (B, n_classes) of texts padded on the right, of which lengths (B,) are real.

        Given targets (B, T), also the summed language-model loss. `reads` names what x is."""
        if reads == "pooled":
            return self.head(x)
        context = self.gpt.context(x)
        if reads == "states":
            return self.score_states(self.first_block, x, context, lengths, targets)
        x = self.embed(x, lengths, context)
        return self.score_states(0, x, context, lengths, targets)

    def embed(self, tokens: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """What goes into the first block, (B, T, C), of tokens (B, T)."""
        x = self.gpt.embed(tokens, context)
        if self.marks is None:
            return x
        run_lengths = self.shared_runs(tokens, lengths)
        return x + self.marks(run_lengths)

    def shared_runs(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, T): length of the longest run of tokens with this one in it that the other text of
        the pair has, too, at most len(marks) - 1. In `a b c [sep] c x a b` it is 2 for a and b, 1
        for c, 0 for x. tokens (B, T), of which lengths (B,) are real."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        is_real = positions < lengths[:, None]  # (B, T)
        is_second = (tokens == self.sep).cumsum(1) > 0  # (B, T): behind the separator, or it
        one = tokens[:, :, None]
        other = tokens[:, None, :]
        is_same = one == other  # (B, T, T)
        is_across = is_second[:, :, None] != is_second[:, None, :]
        are_real = is_real[:, :, None] & is_real[:, None, :]
        is_match = is_same & is_across & are_real
        longest = is_match.any(2).long()
        ends = is_match  # (B, T, T): a shared run of `length` tokens ends in this one and that one
        for length in range(2, self.marks.num_embeddings):
            ended_before = F.pad(ends[:, :-1, :-1], (1, 0, 1, 0))
            ends = is_match & ended_before
            is_in_run = ends.any(2)  # (B, T): its last token, and then each before it
            for _ in range(length - 1):
                is_next_in_run = F.pad(is_in_run[:, 1:], (0, 1))
                is_in_run = is_in_run | is_next_in_run
            longest = torch.where(is_in_run, length, longest)
        return longest

    def score_states(
        self,
        first: int,
        x: Tensor,
        context: Context,
        lengths: Tensor,
        targets: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The scores of hidden states x (B, T, C) that go into block `first`, and the loss of
        their targets where there are any."""
        if targets is None:
            pooled = self.run_and_pool(first, x, context, lengths)
            return self.head(pooled)
        x = self.gpt.run_blocks(x, context, first)
        h = self.gpt.norm(x)
        pooled = self.pool_states(h, lengths)
        return self.head(pooled), self.gpt.loss(h, targets)

    def run_and_pool(self, first: int, x: Tensor, context: Context, lengths: Tensor) -> Tensor:
        """What the head reads, (B, C), of hidden states x (B, T, C) that go into block `first`."""
        if self.pool == "last" and self.mask:  # the last block's MLP then reads one position
            x = self.gpt.run_blocks(x, context, first, at=lengths - 1)  # (B, 1, C)
            return self.gpt.norm(x)[:, 0]
        x = self.gpt.run_blocks(x, context, first)
        h = self.gpt.norm(x)
        return self.pool_states(h, lengths)

    def pool_states(self, h: Tensor, lengths: Tensor) -> Tensor:
        """The last of hidden states h (B, T, C), or their mean, (B, C). With the mask, what is
        padded changes neither."""
        B, T, _ = h.shape
        positions = torch.arange(T, device=h.device)
        end = lengths[:, None] if self.mask else T
        if self.pool == "last":
            is_read = positions == end - 1
        else:
            is_read = positions < end
        is_read = is_read.expand(B, T)
        total = (h * is_read[..., None]).sum(1)
        return total / is_read.sum(1, keepdim=True)

    def run_frozen(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """What the frozen part makes of tokens (B, T), the same at every step: the hidden states
        (B, T, C) that go into the first trained block; or the pooled one (B, C) if no block
        trains. `forward` takes either, with reads="states" or "pooled"."""
        context = self.gpt.context(tokens)
        x = self.embed(tokens, lengths, context)
        if self.first_block == self.gpt.config.n_layer:
            return self.run_and_pool(0, x, context, lengths)
        return self.gpt.run_blocks(x, context, 0, self.first_block)

    def forward_stage(
        self,
        x: Tensor | None,
        first: int,
        end: int,
        tokens: Tensor,
        lengths: Tensor,
        targets: Tensor | None = None,
        reads: Reads = "tokens",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The part of `forward` that lies in blocks first..end, as in GPT. It reads tokens."""
        assert reads == "tokens", "a stage of a pipeline has no cached states"
        context = self.gpt.context(tokens)
        if first == 0:
            x = self.embed(tokens, lengths, context)
        if end < self.gpt.config.n_layer:
            return self.gpt.run_blocks(x, context, first, end)
        return self.score_states(first, x, context, lengths, targets)


# --- the loss, a slice at a time ------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of h @ weight.T + bias against targets, a slice of rows at a time.

    The logits of a slice become their own gradient while they are in the cache, and of a large
    (N, V) only a slice ever exists (the idea of Liger-Kernel). h (N, C), weight (V, C),
    targets (N,), bias (V,), which has no gradient; slice_loss is cross_entropy_slice or the same
    compiled. Returns a float32 (or float64) scalar."""

    @staticmethod
    def forward(
        ctx,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        slice_loss: Callable,
        bias: Tensor | None = None,
    ) -> Tensor:
        device = h.device.type
        with_gradient = any(ctx.needs_input_grad)
        dtype = weight.dtype  # of the matrix products
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        accumulate = torch.float64 if h.dtype == torch.float64 else torch.float32
        logits_at_a_time = 2**22 if device == "cpu" else 2**25
        rows = max(64, logits_at_a_time // weight.size(0))

        w = weight.to(dtype)
        total = torch.zeros((), device=h.device, dtype=accumulate)
        grad_h = torch.empty_like(h)
        grad_w = torch.zeros_like(weight, dtype=accumulate)
        slices = zip(
            h.to(dtype).split(rows),
            targets.split(rows),
            grad_h.split(rows),
            strict=True,
        )
        with torch.autocast(device, enabled=False):
            for x, target, grad_x in slices:
                logits = x @ w.T
                loss, grad_logits = slice_loss(logits, target, accumulate, with_gradient, bias)
                total += loss
                if with_gradient:
                    grad_x.copy_(grad_logits @ w)
                    grad_w += grad_logits.T @ x
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad, grad_w * grad, None, None, None


def cross_entropy_slice(
    logits: Tensor,
    targets: Tensor,
    accumulate: torch.dtype,
    with_gradient: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Summed cross-entropy of logits (N, V), plus bias (V,), in the precision `accumulate`, and its
    gradient (N, V) in that of the logits where it is wanted.

    -log softmax(logits)[target] = log Z - logits[target], where Z is the sum of all exp(logits).
    Its gradient: the probabilities, less 1 at the target."""
    dtype = logits.dtype
    logits = logits.to(accumulate)
    if bias is not None:
        logits = logits + bias
    valid = (targets != IGNORE)[:, None]  # (N, 1)
    index = targets.clamp(min=0)[:, None]  # (N, 1)
    log_z = logits.logsumexp(dim=-1, keepdim=True)  # (N, 1)
    losses = log_z - logits.gather(1, index)
    loss = (losses * valid).sum()
    if not with_gradient:
        return loss, None
    classes = torch.arange(logits.size(1), device=logits.device)
    is_target = classes == index  # (N, V)
    probabilities = (logits - log_z).exp()
    gradient = (probabilities - is_target.to(accumulate)) * valid
    return loss, gradient.to(dtype)


# --- a loss that reads a sample of the vocabulary -------------------------------------------------


def most_classes(n_targets: int, n_classes: int, negatives: int) -> int:
    """How many of n_classes the loss of so many targets reads at most: all, or, where it samples,
    those of the targets and so many others."""
    if not negatives:
        return n_classes
    return min(n_classes, n_targets + negatives)


def sample_classes(
    targets: Tensor, n_classes: int, negatives: int, fixed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Of n_classes those that are targets (N,) here, and so many others drawn at random, which
    stand for all others: S classes in all.

    Returns the classes (S,); the place of each target among them (N,), IGNORE where there is none;
    and what is to be added to their logits (S,): log of the number of classes that one stands for.
    So the sum of all exponentials is estimated without bias (sampled softmax, Jean et al. 2015).
    The targets of thousands of tokens hold the frequent classes; only rare ones are sampled.

    fixed: S is the most that there can be, and those too many count nothing. So its size does not
    depend on the targets, and nobody waits for a GPU that has them."""
    device = targets.device
    is_valid = targets != IGNORE
    index = torch.where(is_valid, targets, n_classes)  # IGNORE: one class more, cut off below
    is_target = torch.zeros(n_classes + 1, dtype=torch.bool, device=device)
    is_target.index_fill_(0, index, True)
    is_target = is_target[:n_classes]
    n_present = is_target.sum()
    n_absent = n_classes - n_present
    n_drawn = n_absent.clamp(max=negatives)
    n_read = n_present + n_drawn

    # all classes in the order of their draw: those of the targets first, then the others shuffled
    keys = torch.rand(n_classes, device=device)
    keys = torch.where(is_target, -1.0, keys)
    order = keys.argsort(stable=True)
    size = most_classes(len(targets), n_classes, negatives) if fixed else int(n_read)
    classes = order[:size]

    ranks = torch.arange(n_classes, device=device)
    rank_of_class = torch.empty_like(order)
    rank_of_class[order] = ranks
    places = torch.where(is_valid, rank_of_class[targets.clamp(min=0)], IGNORE)

    ranks = ranks[:size]
    log_others = (n_absent / n_drawn).log()  # that a drawn one stands for
    bias = torch.where(ranks < n_present, 0.0, log_others)
    bias = bias.masked_fill(ranks >= n_read, -math.inf)
    return classes, places, bias
