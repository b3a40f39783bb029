"""What a model answers to a file of prompts, each in a conversation of its own.

    python scripts/replies.py checkpoints/base
    python scripts/replies.py checkpoints/base each=3                 the first three of each group
    python scripts/replies.py checkpoints/base form=table > docs/base_replies.md

A prompt is a line of the file, a blank line is between groups, such as languages. The answers are
the likeliest ones, unless sample.temperature is set: the same model gives the same answers.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from smallgpt import console, hardware, settings
from smallgpt.console import UserError
from smallgpt.sampling import SampleSettings, replies
from smallgpt.settings import Count, Device
from smallgpt.text.formats import read_dialogues
from smallgpt.weights.pretrained import open_talker, own_model

GREEDY = SampleSettings(temperature=0.0)


@dataclass
class ReplySettings:
    prompts: str = "config/prompts.txt"  # a file of prompts
    each: Count = 0  # so many of each group; 0 = all
    form: Literal["text", "table"] = "text"  # table = in Markdown
    device: Device = "auto"  # auto = a GPU if there is one
    sample: SampleSettings = field(default_factory=lambda: replace(GREEDY))  # choice of tokens


def main() -> None:
    models, words = settings.split_words(sys.argv[1:])
    s = settings.load(ReplySettings, words, doc=__doc__)
    models = models or [own_model()]
    if len(models) > 1 or not models[0]:
        raise UserError("which model? python scripts/replies.py checkpoints/<run>")
    groups = []
    for group in read_dialogues(s.prompts):
        groups.append(group.turns[: s.each or None])
    device = hardware.choose_device(s.device)
    name, model, tokenizer = open_talker(models[0])
    model.to(device)
    if s.form == "table":
        print(f"The answers of {name} to {s.prompts}, {how_chosen(s.sample)}:")
    for group in groups:
        answers = replies(model, tokenizer, group, s.sample)
        pairs = list(zip(group, answers, strict=True))
        print("\n".join(table(pairs) if s.form == "table" else lines(pairs)))


def how_chosen(s: SampleSettings) -> str:
    """The settings that decide the answers, in words."""
    return (
        f"temperature {s.temperature}, top_p {s.top_p}, repetition penalty "
        f"{s.repetition_penalty}, seed {s.seed}"
    )


def lines(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"  {prompt} → {answer}" for prompt, answer in pairs]


def table(pairs: list[tuple[str, str]]) -> list[str]:
    """Markdown; a | in a cell would end it."""
    rows = ["", "| prompt | answer |", "|---|---|"]
    for prompt, answer in pairs:
        cells = [text.replace("|", "\\|") for text in (prompt, answer)]
        rows.append(f"| {cells[0]} | {cells[1]} |")
    return rows


if __name__ == "__main__":
    console.run(main)
