"""Turning scores into text: the choice of a token, and a conversation in the KV cache."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from model import GPT, KVCache, take_position
from smallgpt import turns
from smallgpt.console import UserError
from smallgpt.settings import Count, Positive, PositiveFraction
from smallgpt.tokenizer import Tokenizer

FEW = 256  # tokens that mostly reach top_p: to sort the whole vocabulary takes 20 times as long
ROWS = 32  # prompts that are answered together: the cache of more would need much memory


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
    probs, tokens = nucleus(logits.softmax(-1), s.top_p)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return int(tokens[drawn])


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


def nucleus(probs: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens that together reach probability p (Holtzman et al. 2019), given probs
    (V,): their probabilities and their ids.

    A token stays if those before it have not reached p: the one that crosses it is kept."""
    V = probs.numel()
    if p >= 1:
        return probs, torch.arange(V, device=probs.device)
    few = min(FEW, V)
    ordered, tokens = probs.topk(few)
    if ordered.sum() < p:
        ordered, tokens = probs.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    is_kept = before < p
    return ordered[is_kept], tokens[is_kept]


def one_line(text: str) -> str:
    """The text with a space for each line break and other control character."""
    return printable(text).replace("\n", " ")


def printable(text: str) -> str:
    """The text with a space for each control character but line breaks.

    A model that learned a terminal's escape sequences must not play with the terminal."""
    shown = []
    for character in text:
        is_control = character != "\n" and unicodedata.category(character) == "Cc"
        shown.append(" " if is_control else character)
    return "".join(shown)


class Dialogue:
    """A history in tokens, and the choice of the next one.

    How a turn is written, and what ends a reply, is told by the tokenizer's `TurnTemplate`. When
    the history outgrows block_size, whole oldest turns go; the system prompt stays."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: SampleSettings):
        self.tokenizer = tokenizer
        self.template = turns.of(tokenizer)
        self.settings = settings
        self.block_size = model.config.block_size
        self.device = model.wte.weight.device
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(settings.seed)

        beyond = range(tokenizer.vocab_size, model.config.vocab_size)  # they round it up
        banned = [*self.template.silent, *beyond]
        banned_first = [*banned, *self.template.ends]  # an empty reply is none
        self.banned = torch.tensor(banned, device=self.device)
        self.banned_first = torch.tensor(banned_first, device=self.device)
        self.system: str | None = None  # the system prompt; None = the template's own
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.ids: list[int] = self.template.begin(self.system)  # the history
        self.begin = len(self.ids)  # so many of the first ids stay: opening and system prompt
        self.turns: list[int] = []  # where each turn begins in ids
        self.cached = 0  # so many of the first ids have their keys and values in the cache
        self.reply_begin = 0  # where the text of the last reply begins in ids
        self.reply_tokens = 0  # of the last reply
        self.is_complete = False  # did the model end its last reply itself?

    def set_system(self, text: str | None) -> None:
        """Give the dialogue another system prompt, before all that was said. Empty: none; None: the
        template's own. UserError where it is too long."""
        begin = self.template.begin(text)
        if len(begin) > self.block_size // 2:
            raise UserError(
                f"the system prompt has {len(begin)} tokens: it must leave half of the "
                f"{self.block_size} that the model can read"
            )
        said = self.ids[self.begin :]
        moved = len(begin) - self.begin
        self.system = text
        self.ids = [*begin, *said]
        self.begin = len(begin)
        self.turns = [turn + moved for turn in self.turns]
        self.cached = 0

    def say(self, text: str) -> None:
        """Add a turn of the user."""
        self.turns.append(len(self.ids))
        self.ids += self.template.write("user", text)

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
        before, after = self.template.around["assistant"]
        room = self.block_size - self.begin - len(before) - len(after)
        reply = min(self.settings.max_tokens, room // 2)
        room = max(1, room - reply)  # for what was said
        if len(self.ids) - self.begin <= room:
            return
        while len(self.turns) > 1 and len(self.ids) - self.turns[0] > room:
            self.turns.pop(0)
        kept = self.ids[self.turns[0] :]
        if len(kept) > room:  # a single turn longer than the room keeps its end
            head, _ = self.template.around["user"]
            end = max(1, room - len(head))
            kept = [*head, *kept[-end:]]
        moved = self.turns[0] - self.begin
        self.ids = [*self.ids[: self.begin], *kept]
        self.turns = [turn - moved for turn in self.turns]
        self.cached = 0  # the positions have changed

    def begin_reply(self) -> None:
        """Begin the model's turn."""
        self.make_room()
        before, _ = self.template.around["assistant"]
        self.turns.append(len(self.ids))
        self.ids += before
        self.reply_begin = len(self.ids)
        self.reply_tokens = 0
        self.is_complete = False

    def end_reply(self) -> None:
        """Close the model's turn, however it ended: the history stays a well-formed dialogue."""
        _, after = self.template.around["assistant"]
        self.ids += after

    def has_room(self) -> bool:
        """May the reply have one more token? What closes the turn must fit behind it."""
        _, after = self.template.around["assistant"]
        is_short = self.reply_tokens < self.settings.max_tokens
        return is_short and len(self.ids) < self.block_size - len(after)

    def shown(self, text: str) -> str:
        """A piece of a reply, as it may be printed."""
        return printable(text) if self.template.has_lines else one_line(text)

    def choose(self, logits: Tensor) -> int | None:
        """The next token of the reply, given its scores (V,), added to the history; None where the
        model ends the reply."""
        banned = self.banned if self.reply_tokens else self.banned_first
        logits = logits.index_fill(0, banned, -torch.inf)
        so_far = self.ids[self.reply_begin :]
        token = pick(logits, so_far, self.settings, self.generator)
        if token in self.template.ends:
            self.is_complete = True
            return None
        self.ids.append(token)
        self.reply_tokens += 1
        return token


@torch.inference_mode()
def read(model: GPT, cache: KVCache, dialogues: list[Dialogue]) -> Tensor:
    """Scores (B, V) of the token after each of B dialogues, whose rows in the cache are in the same
    order. Only what is new is read; of a dialogue with nothing new, its last token again."""
    starts = []
    new = []
    for dialogue in dialogues:
        start = min(dialogue.cached, len(dialogue.ids) - 1)
        starts.append(start)
        new.append(dialogue.ids[start:])
    lengths = [len(ids) for ids in new]
    longest = max(lengths)
    # the padding on the right is written to the cache, where the next tokens replace it unread
    padded = []
    for ids in new:
        padding = [0] * (longest - len(ids))
        padded.append(ids + padding)
    device = cache.k.device
    idx = torch.tensor(padded, device=device)

    is_aligned = len(set(starts)) == 1
    start = starts[0] if is_aligned else torch.tensor(starts, device=device)
    h = model.trunk(idx, cache=cache, start=start)  # (B, T, C)
    for dialogue in dialogues:
        dialogue.cached = len(dialogue.ids)
    ends = torch.tensor(lengths, device=device)
    h = take_position(h, ends - 1)  # (B, 1, C)
    return model.lm_head(h)[:, 0]


class Conversation(Dialogue):
    """A dialogue with a model.

    Only new text is ever read: a turn costs its own length, not that of the history. Where oldest
    turns had to go, what is left is read again, since its positions have changed."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: SampleSettings):
        super().__init__(model, tokenizer, settings)
        self.model = model
        self.cache = model.new_cache()

    def reply(self) -> Iterator[str]:
        """Generate the next turn, piece by piece; pieces are whole characters.

        The turn is closed however it ends: by the model, at max_tokens, at the end of the block, or
        because the caller stopped listening (Ctrl-C): the history stays a well-formed dialogue."""
        yield from filter(None, self.pieces())

    def pieces(self) -> Iterator[str]:
        """`reply` with a piece for each token, "" where it completes no character: the caller may
        stop at any token."""
        self.begin_reply()
        stream = self.tokenizer.stream()
        try:
            for token in self.next_tokens():
                yield self.shown(stream.push(token))
            yield self.shown(stream.flush())
        finally:
            self.end_reply()

    def next_tokens(self) -> Iterator[int]:
        """The tokens of a reply until it ends, each added to the history first."""
        while self.has_room():
            logits = read(self.model, self.cache, [self])
            token = self.choose(logits[0])
            if token is None:
                return
            yield token


def replies(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], settings: SampleSettings
) -> list[str]:
    """One reply to each prompt, each in a dialogue of its own: what `Conversation` gives, but a
    step of the model makes a token of many replies."""
    was_training = model.training
    model.eval()
    answers = []
    for first in range(0, len(prompts), ROWS):
        some = prompts[first : first + ROWS]
        answers += reply_together(model, tokenizer, some, settings)
    model.train(was_training)
    return answers


def reply_together(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], settings: SampleSettings
) -> list[str]:
    """The replies to a batch of prompts. It ends with the longest of them."""
    dialogues = []
    for prompt in prompts:
        dialogue = Dialogue(model, tokenizer, settings)
        dialogue.say(prompt)
        dialogue.begin_reply()
        dialogues.append(dialogue)
    longest = max(len(dialogue.ids) for dialogue in dialogues)
    length = min(longest + settings.max_tokens, model.config.block_size)
    cache = model.new_cache(len(dialogues), length)

    going = [row for row, dialogue in enumerate(dialogues) if dialogue.has_room()]
    while going:
        logits = read(model, cache, dialogues)
        unfinished = []
        for row in going:
            token = dialogues[row].choose(logits[row])
            if token is not None and dialogues[row].has_room():
                unfinished.append(row)
        going = unfinished

    answers = []
    for dialogue in dialogues:
        said = dialogue.ids[dialogue.reply_begin :]
        text = tokenizer.decode(said)
        answers.append(dialogue.shown(text))
    return answers
