"""Turning scores into text: choosing a token, and a conversation whose history stays in the KV cache."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
from annotated_types import Ge, Le
from torch import Tensor

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
    logits: Tensor, seen: list[int], s: SampleSettings, generator: torch.Generator | None = None
) -> int:
    """Choose the next token from logits (V,). The order is that of the field: penalty, temperature, top-k, top-p."""
    logits = logits.float()
    if s.repetition_penalty != 1.0 and seen:  # Keskar et al. 2019 (CTRL)
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        score = logits[ids]
        score = torch.where(score > 0, score / s.repetition_penalty, score * s.repetition_penalty)
        logits = logits.index_copy(0, ids, score)
    if s.temperature == 0:
        return int(logits.argmax())
    logits = logits / s.temperature
    if 0 < s.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[-1], -torch.inf)
    probs = logits.softmax(-1)
    if (
        s.top_p < 1
    ):  # Holtzman et al. 2019: keep a token if those before it have not reached top_p yet
        ordered, order = probs.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= s.top_p] = 0
        probs = torch.zeros_like(probs).scatter(0, order, ordered)
    return int(torch.multinomial(probs, 1, generator=generator))


def one_line(text: str) -> str:
    """The text without line breaks and other control characters: an utterance is a line, and a model that learned a
    terminal's escape sequences must not play with it."""
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)


class Conversation:
    """A dialogue with a model. `ids` is the history; the cache holds keys and values of its first `cached` tokens.

    Only new text is ever read: a turn costs its own length, not that of the history. When the history outgrows
    block_size, whole oldest turns go, and what is left is read again (its positions have changed).
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, settings: SampleSettings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.cache = model.new_cache()
        self.block_size = model.config.block_size
        self.generator = torch.Generator(self.cache.k.device).manual_seed(settings.seed)
        t = tokenizer
        # what no reply may hold: ids that stand for no text, and the rows that only round the vocabulary up; and,
        # an empty reply being no reply, what it may not begin with
        never = [
            *(t.token_bytes() == 0).nonzero()[0].tolist(),
            *range(t.vocab_size, model.config.vocab_size),
        ]
        self.never = torch.tensor(never, device=self.cache.k.device)
        self.never_first = torch.tensor([*never, t.sep, t.end], device=self.cache.k.device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.ids: list[int] = [self.tokenizer.bos]
        self.turns: list[int] = []  # where each turn begins in ids
        self.cached = self.reply_tokens = 0

    def say(self, text: str) -> None:
        """Add a turn of the user."""
        self.turns.append(len(self.ids))
        self.ids += [*self.tokenizer.encode(text), self.tokenizer.sep]

    def undo(self) -> bool:
        """Take back the last exchange (the user's turn and the reply); False if there is none."""
        if len(self.turns) < 2:
            return False
        self.ids = self.ids[: self.turns[-2]]
        self.turns = self.turns[:-2]
        self.cached = min(self.cached, len(self.ids))
        return True

    def make_room(self) -> None:
        """Drop whole oldest turns until a reply fits behind the history."""
        limit = max(2, self.block_size - 1 - min(self.settings.max_tokens, self.block_size // 2))
        if len(self.ids) <= limit:
            return
        while len(self.turns) > 1 and 1 + len(self.ids) - self.turns[0] > limit:
            self.turns.pop(0)
        # a single turn longer than the room keeps its end
        kept = self.ids[self.turns[0] :][-(limit - 1) :]
        moved = len(self.ids) - len(kept) - 1
        self.ids = [self.tokenizer.bos, *kept]
        self.turns = [max(1, t - moved) for t in self.turns]
        self.cached = 0

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Read what is new; scores (V,) of the token after the history."""
        new = torch.tensor([self.ids[self.cached :]], device=self.cache.k.device)
        h = self.model.trunk(new, cache=self.cache, start=self.cached)
        self.cached = len(self.ids)
        return self.model.lm_head(h[0, -1])

    def reply(self) -> Iterator[str]:
        """Generate the next turn, piece by piece; pieces are whole characters.

        The turn is closed however it ends: by the model, at max_tokens, at the end of the block, or because the caller
        stopped listening (Ctrl-C), so that the history stays a well-formed dialogue.
        """
        t, s = self.tokenizer, self.settings
        self.make_room()
        begin = len(self.ids)
        self.turns.append(begin)
        self.reply_tokens = 0
        stream = t.stream()
        try:
            while (
                self.reply_tokens < s.max_tokens and len(self.ids) < self.block_size - 1
            ):  # room for the end
                banned = self.never if self.reply_tokens else self.never_first
                logits = self.next_logits().index_fill(0, banned, -torch.inf)
                token = pick(logits, self.ids[begin:], s, self.generator)
                if token in (t.sep, t.end):
                    break
                self.ids.append(token)
                self.reply_tokens += 1
                if piece := one_line(stream.push(token)):
                    yield piece
            if piece := one_line(stream.flush()):
                yield piece
        finally:
            self.ids.append(t.sep)


def replies(
    model: nn.Module, tokenizer: Tokenizer, prompts: list[str], settings: SampleSettings
) -> list[str]:
    """One reply to each prompt, each in a conversation of its own."""
    answers = []
    was_training = model.training
    model.eval()
    for prompt in prompts:
        talk = Conversation(model, tokenizer, settings)
        talk.say(prompt)
        answers.append("".join(talk.reply()))
    model.train(was_training)
    return answers
