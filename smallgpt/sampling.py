"""Turning scores into text: the choice of a token, and a conversation in the KV cache."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from model import GPT
from smallgpt.settings import Count, Positive, PositiveFraction
from smallgpt.tokenizer import Tokenizer


@dataclass
class SampleSettings:
    temperature: Annotated[float, Ge(0), Le(1000)] = 0.8  # 0 = always the likeliest token
    top_k: Count = 0  # only the k likeliest tokens; 0 = all
    top_p: PositiveFraction = 0.9  # only the likeliest tokens that together are this probable
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.1  # above 1: less of the same
    max_tokens: Positive = 100  # longest reply, in tokens
    seed: int = 0  # of the sampling; the same seed gives the same replies

    def check(self) -> list[str]:
        """Problems that the types do not show, in plain words."""
        if 0 < self.temperature < 1e-3:
            least = "must be at least 0.001, or 0: always the likeliest token"
            return [f"temperature={self.temperature} {least}"]
        return []


def pick(
    logits: Tensor,
    seen: list[int],
    s: SampleSettings,
    generator: torch.Generator | None = None,
) -> int:
    """Choose the next token from logits (V,), given the tokens of the reply so far.

    The order is that of the field: repetition penalty, temperature, top-k, top-p."""
    logits = penalize_repetition(logits.float(), seen, s.repetition_penalty)
    if s.temperature == 0:
        return int(logits.argmax())
    logits = mask_below_top_k(logits / s.temperature, s.top_k)
    probs = cut_to_top_p(logits.softmax(-1), s.top_p)
    token = torch.multinomial(probs, 1, generator=generator)
    return int(token)


def penalize_repetition(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Make the tokens in `seen` less likely (CTRL, Keskar et al. 2019).

    A positive score is divided by the penalty, a negative one multiplied."""
    if penalty == 1.0 or not seen:
        return logits
    distinct = sorted(set(seen))
    ids = torch.tensor(distinct, device=logits.device)
    score = logits[ids]
    score = torch.where(score > 0, score / penalty, score * penalty)
    return logits.index_copy(0, ids, score)


def mask_below_top_k(logits: Tensor, k: int) -> Tensor:
    """Forbid all tokens but the k likeliest, and those that are as likely as the last of them."""
    if k == 0 or k >= logits.numel():
        return logits
    least = logits.topk(k).values[-1]
    return logits.masked_fill(logits < least, -torch.inf)


def cut_to_top_p(probs: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens that together reach probability p (Holtzman et al. 2019).

    A token stays if those before it have not reached p: the one that crosses it is kept."""
    if p >= 1:
        return probs
    ordered, order = probs.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered[before >= p] = 0
    cut = torch.zeros_like(probs)
    return cut.scatter(0, order, ordered)


def one_line(text: str) -> str:
    """The text with a space for each line break and other control character.

    An utterance is a line; and a model that learned a terminal's escape sequences must not play
    with the terminal."""
    shown = [" " if unicodedata.category(c) == "Cc" else c for c in text]
    return "".join(shown)


def unspeakable(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids that no reply may hold: they stand for no text, or only round the vocabulary up."""
    n_bytes = tokenizer.token_bytes()
    no_text = (n_bytes == 0).nonzero()[0]
    beyond = range(tokenizer.vocab_size, vocab_size)
    return [*no_text.tolist(), *beyond]


class Conversation:
    """A dialogue with a model.

    Only new text is ever read: a turn costs its own length, not that of the history. When the
    history outgrows block_size, whole oldest turns go, and what is left is read again, since its
    positions have changed."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: SampleSettings):
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.block_size = model.config.block_size
        self.cache = model.new_cache()
        self.device = self.cache.k.device
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(settings.seed)

        banned = unspeakable(tokenizer, model.config.vocab_size)
        banned_first = [*banned, tokenizer.sep, tokenizer.end]  # an empty reply is none
        self.banned = torch.tensor(banned, device=self.device)
        self.banned_first = torch.tensor(banned_first, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.ids: list[int] = [self.tokenizer.bos]  # the history
        self.turns: list[int] = []  # where each turn begins in ids
        self.cached = 0  # so many of the first ids have their keys and values in the cache
        self.reply_tokens = 0  # of the last reply

    def say(self, text: str) -> None:
        """Add a turn of the user."""
        self.turns.append(len(self.ids))
        self.ids += self.tokenizer.encode(text)
        self.ids.append(self.tokenizer.sep)

    def undo(self) -> bool:
        """Take back the last exchange (the user's turn and the reply); False if there is none."""
        if len(self.turns) < 2:
            return False
        begin = self.turns[-2]
        self.ids = self.ids[:begin]
        self.turns = self.turns[:-2]
        self.cached = min(self.cached, begin)
        return True

    def make_room(self) -> None:
        """Drop whole oldest turns until a reply fits behind the history."""
        reply = min(self.settings.max_tokens, self.block_size // 2)
        limit = max(2, self.block_size - 1 - reply)  # the longest history, with its <|bos|>
        if len(self.ids) <= limit:
            return
        while len(self.turns) > 1:
            length = 1 + len(self.ids) - self.turns[0]
            if length <= limit:
                break
            self.turns.pop(0)
        kept = self.ids[self.turns[0] :]
        kept = kept[-(limit - 1) :]  # a single turn longer than the room keeps its end
        moved = len(self.ids) - len(kept) - 1
        self.ids = [self.tokenizer.bos, *kept]
        self.turns = [max(1, begin - moved) for begin in self.turns]
        self.cached = 0

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Read what is new; scores (V,) of the token after the history."""
        new = self.ids[self.cached :]
        idx = torch.tensor([new], device=self.device)
        h = self.model.trunk(idx, cache=self.cache, start=self.cached)
        self.cached = len(self.ids)
        return self.model.lm_head(h[0, -1])

    def reply(self) -> Iterator[str]:
        """Generate the next turn, piece by piece; pieces are whole characters.

        The turn is closed however it ends: by the model, at max_tokens, at the end of the block, or
        because the caller stopped listening (Ctrl-C): the history stays a well-formed dialogue."""
        self.make_room()
        self.turns.append(len(self.ids))
        self.reply_tokens = 0
        stream = self.tokenizer.stream()
        try:
            for token in self.next_tokens():
                piece = one_line(stream.push(token))
                if piece:
                    yield piece
            piece = one_line(stream.flush())
            if piece:
                yield piece
        finally:
            self.ids.append(self.tokenizer.sep)

    def next_tokens(self) -> Iterator[int]:
        """The tokens of a reply until the model ends it, each added to the history first."""
        s = self.settings
        begin = self.turns[-1]
        ends = (self.tokenizer.sep, self.tokenizer.end)
        last = self.block_size - 1  # room for the separator
        while self.reply_tokens < s.max_tokens and len(self.ids) < last:
            logits = self.next_logits()
            banned = self.banned if self.reply_tokens else self.banned_first
            logits = logits.index_fill(0, banned, -torch.inf)
            so_far = self.ids[begin:]
            token = pick(logits, so_far, s, self.generator)
            if token in ends:
                return
            self.ids.append(token)
            self.reply_tokens += 1
            yield token


def replies(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], settings: SampleSettings
) -> list[str]:
    """One reply to each prompt, each in a conversation of its own."""
    was_training = model.training
    model.eval()
    answers = []
    for prompt in prompts:
        talk = Conversation(model, tokenizer, settings)
        talk.say(prompt)
        reply = "".join(talk.reply())
        answers.append(reply)
    model.train(was_training)
    return answers
