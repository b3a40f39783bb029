"""How a turn of a dialogue is written in tokens.

of          a tokenizer -> the TurnTemplate of the models that read its ids
own_turns   what train.py teaches: [bos] text [sep] text [sep] ... [end]; a system prompt follows
            an empty turn: [bos] [sep] prompt [sep] text [sep] ...
chatml      what published chat models have read:
            <|im_start|>user\\n text <|im_end|>\\n<|im_start|>assistant\\n text <|im_end|>\\n ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from smallgpt.console import UserError
from smallgpt.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class TurnTemplate:
    """The tokens around what is said, and what a reply may hold."""

    tokenizer: Tokenizer
    opening: Ids  # before the first turn
    around: dict[Role, tuple[Ids, Ids]]  # before and after what this role says
    ends: frozenset[int]  # tokens by which the model ends its turn
    silent: Sequence[int]  # ids that no reply may hold
    system: str = ""  # the system prompt of a dialogue that is given none
    has_lines: bool = False  # may a turn hold line breaks?

    def write(self, role: Role, text: str) -> list[int]:
        """A whole turn. What the text spells is text, even if it looks like a special token."""
        before, after = self.around[role]
        return [*before, *self.tokenizer.encode(text), *after]

    def begin(self, system: str | None = None) -> list[int]:
        """What a dialogue begins with: the opening, and the system prompt where there is one (None:
        the template's own)."""
        prompt = self.system if system is None else system
        if not prompt:
            return list(self.opening)
        return [*self.opening, *self.write("system", prompt)]


def of(tokenizer: Tokenizer) -> TurnTemplate:
    """The template of the models that read the ids of this tokenizer."""
    published = tokenizer.published
    if published is None:
        return own_turns(tokenizer)
    if published.system is None:
        raise UserError(
            "this model was published without ChatML turns, so it cannot be talked to: take the "
            "Instruct version of it, or fine-tune it as a trunk"
        )
    return chatml(tokenizer, published.system, published.rows)


def own_turns(tokenizer: Tokenizer) -> TurnTemplate:
    """The turns of `Tokenizer.encode_turns`: a separator behind each, and one before a prompt."""
    sep = (tokenizer.sep,)
    ends = frozenset([tokenizer.sep, tokenizer.end])
    return TurnTemplate(
        tokenizer,
        opening=(tokenizer.bos,),
        around={"system": (sep, sep), "user": ((), sep), "assistant": ((), sep)},
        ends=ends,
        silent=tokenizer.textless(),
    )


def chatml(tokenizer: Tokenizer, system: str, rows: int) -> TurnTemplate:
    """ChatML (OpenAI 2023), with the spaces of Hugging Face's templates.

    rows: ids from here on are unknown to the model, our own special tokens among them."""
    begin = tokenizer.special("<|im_start|>")
    end = tokenizer.special("<|im_end|>")
    newline = tokenizer.encode("\n")

    def around(role: Role) -> tuple[Ids, Ids]:
        before = (begin, *tokenizer.encode(role), *newline)
        return before, (end, *newline)

    never = {*tokenizer.textless(), *range(rows, tokenizer.vocab_size)} - {end}
    return TurnTemplate(
        tokenizer,
        opening=(),
        around={role: around(role) for role in ("system", "user", "assistant")},
        ends=frozenset([end]),
        silent=sorted(never),
        system=system,
        has_lines=True,
    )
