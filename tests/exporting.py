"""What tests of exports share: random models of every form, tokenizers, and texts on which the
latter are known to differ."""

import functools
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers import ENV
from model import GPT, GPTClassifier, GPTConfig
from smallgpt import tokenizer as tokenizers
from smallgpt.runs.checkpoint import Checkpoint
from smallgpt.tokenizer import Tokenizer, TokenizerSettings
from smallgpt.weights.export import Source

GPT2 = {"pos": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}
PIECES = [
    *["the", " cat", " sat", "it's", " we'll", "'RE", " 12", "3456", "你好", "世界", "é", "ß"],
    *["\n", "\t", "  ", "   ", "?!", ".", "😀", "👩‍👩‍👧", "\u00a0", "\u200b", "ΑΣ", "İ", "<|sep|>"],
    *["<|bos|>", "<|end|>", "\ufeff", "\x00", "\x1c", "ﬁ", "e\u0301", "\u2028", "안녕", "ا"],
]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\n\n", "\x0b", "\x0c", "\x85", "\u3000", "\u2029"]
SPECIALS = ["<|sep|>", "<|end|>", "<|bos|>", "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|"]
SCRIPTS = [  # the first letter of a block, and how many
    *[(0x41, 26), (0xC0, 64), (0x391, 57), (0x410, 64), (0x5D0, 27), (0x627, 36), (0x905, 50)],
    *[(0xE01, 46), (0x1100, 90), (0x3041, 86), (0x30A1, 90), (0x4E00, 20_000), (0xAC00, 11_000)],
    *[(0x1F300, 600), (0x20000, 40_000), (0x1D400, 900)],
]


def stress_lines(count: int) -> list[str]:
    """The empty text, then a hundred lines of each kind in ten: the pieces above, spaces and line
    breaks, special tokens that a user typed, digits, words of all scripts, combining marks, control
    characters, long repeats, any characters at all, and all of these in one."""
    draw = random.Random(1)

    def letters() -> str:
        first, size = draw.choice(SCRIPTS)
        return "".join(chr(first + draw.randrange(size)) for _ in range(draw.randrange(1, 9)))

    def digits() -> str:
        return draw.choice(["", " ", "-", "٣"]) + str(draw.randrange(10 ** draw.randrange(1, 12)))

    def marked() -> str:
        marks = [chr(0x300 + draw.randrange(0x70)) for _ in range(draw.randrange(1, 4))]
        return draw.choice(["e", " a", "क", "ن", "\u0301", "好"]) + "".join(marks)

    def control() -> str:
        code = draw.choice([draw.randrange(0x20), draw.randrange(0x7F, 0xA0), 0x200B, 0x202E])
        return chr(code)

    def anything() -> str:
        code = draw.choice([draw.randrange(0x3000), draw.randrange(0x110000)])
        return "" if 0xD800 <= code < 0xE000 else chr(code)  # half of a pair is no text

    def repeat() -> str:
        return draw.choice([" ", "a", "好", "!", "1", "\n", "ab", "😀"]) * draw.randrange(50, 300)

    kinds = [
        lambda: draw.choice(PIECES),
        lambda: draw.choice([*SPACES, "word", "好"]),
        lambda: draw.choice([*SPECIALS, " the", "好"]),
        digits,
        letters,
        marked,
        control,
        repeat,
        anything,
    ]
    kinds.append(lambda: draw.choice(kinds[:-1])())
    lines = [""]
    while len(lines) < count:
        kind = kinds[len(lines) % len(kinds)]
        size = 2 if kind is repeat else draw.randrange(1, 16)
        lines.append("".join(kind() for _ in range(size)))
    return lines


@functools.cache
def vocabulary(kind: str) -> Tokenizer:
    """A tokenizer trained on texts of the pieces."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=draw.randrange(1, 20))) for _ in range(300)]
    texts = [text for text in texts if "<|" not in text]
    settings = TokenizerSettings(kind=kind, vocab_size=500, min_count=1)
    return tokenizers.train(settings, texts)


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        p.copy_(0.25 * torch.randn(p.shape) if p.dim() == 2 else p + 0.3 * torch.randn(p.shape))
    return model.eval()


def source_of(tokenizer: Tokenizer, **shape: object) -> Source:
    """A language model of this form, of whose run nothing is known."""
    rows = 64 * -(-tokenizer.vocab_size // 64)
    sizes = dict(vocab_size=rows, block_size=64, n_layer=2, n_head=4, n_embd=64)
    config = GPTConfig(**sizes | shape)
    nothing = Checkpoint(Path("runs/lively/step-00000001"), {"step": 1})
    return Source(nothing, lively(GPT(config)), tokenizer, head=None)


def classifier_of(
    tokenizer: Tokenizer,
    pool: str = "last",
    mask: bool = True,
    marks: int = 0,
    cue: Sequence[int] = (),
    **shape: object,
) -> Source:
    """A classifier of this form with three labels."""
    source = source_of(tokenizer, **shape)
    model = GPTClassifier(source.model, 3, pool, mask, tokenizer.sep, marks)
    head = {
        "labels": ["bad", "good", "so-so"],
        "pool": pool,
        "mask": mask,
        "block_size": 48,
        "prefix": [tokenizer.bos],
        "cue": list(cue),
        "marks": marks,
        "rows": source.config.vocab_size,
    }
    return replace(source, model=lively(model), head=head)


def some_ids(vocab: int) -> Tensor:
    return torch.randint(vocab, (3, 40), generator=torch.Generator().manual_seed(1))


def assert_close(a: Tensor, b: Tensor) -> None:
    """To 1e-5 of the largest logit."""
    assert a.shape == b.shape
    assert float(b.abs().max()) > 3
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), (a - b).abs().max()


WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = sys.modules['smallgpt'] = None; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def run_example(file: Path, *texts: str, stdin: str = "") -> list[str]:
    """The lines that an example prints, in a process that cannot import torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, str(file), *texts]
    done = subprocess.run(command, env=ENV, input=stdin.encode(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()
