"""Talk to a pretrained model.

    python chat.py                                      the model of the repository
    python chat.py checkpoints/quickstart               a run's best checkpoint, or a step folder
    python chat.py smollm2                              SmolLM2-135M-Instruct, after `make smollm2`
    python chat.py config/chat300M.yaml                 the same, with the settings in a file
    python chat.py checkpoints/quickstart sample.temperature=0.5 sample.top_k=50
    echo "你好" | python chat.py checkpoints/quickstart  one reply a line

Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.
"""

import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smallgpt import console, files, settings
from smallgpt.console import UserError
from smallgpt.inference import Precision, open_conversation
from smallgpt.sampling import Conversation, SampleSettings, one_line
from smallgpt.settings import Device
from smallgpt.weights.pretrained import own_model

HELP = """\
  /reset              forget the conversation (also: flush)
  /undo               take back your last line and its reply
  /system TEXT        set the system prompt, which stands before all that was said; no TEXT: none
  /set KEY=VALUE ...  change the sampling: {keys}
  /stats              speed, and how full the context is
  /save FILE          add the conversation to FILE, in the corpus format (.jsonl: with roles)
  /exit               leave (also: exit, Ctrl-D)
  Ctrl-C              stop a reply"""


@dataclass
class ChatSettings:
    checkpoint: str = field(  # run folder (its best checkpoint) | an export | a Llama | smollm2
        default_factory=own_model
    )
    device: Device = "auto"  # auto = a GPU if there is one
    dtype: Precision = "auto"  # precision of the weights
    sample: SampleSettings = field(default_factory=SampleSettings)  # how tokens are chosen


def main() -> int:
    s = settings.load(ChatSettings, settings.name_checkpoint(sys.argv[1:]), doc=__doc__)
    if not s.checkpoint:
        raise UserError(
            "which model? python chat.py checkpoints/<run>, a folder that train.py has written; or "
            "python chat.py smollm2"
        )
    stdin = console.open_stdin()
    name, talk, description = open_conversation(s.checkpoint, s.sample, s.device, s.dtype)
    is_piped = not stdin.isatty()
    chat = Chat(talk, is_piped, has_read_prompts(name))
    if is_piped:
        return converse(chat, prompt="")
    print(f"{description}. /help lists the commands.")
    line_editing()
    return converse(chat, prompt="> ")


def has_read_prompts(name: str) -> bool:
    """Whether the corpus of a run had system prompts; of a model from elsewhere it is not known,
    and taken for granted."""
    meta = files.read_json(Path(name) / "meta.json")
    if not isinstance(meta, dict):
        return True
    return any(source.get("prompts") for source in meta.get("sources", []))


def converse(chat: "Chat", prompt: str) -> int:
    """Answer line after line, to the end of the input or /exit. A person who types has a prompt."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            continue
        line = {"flush": "/reset", "exit": "/exit"}.get(line, line)
        if line in ("/exit", "/quit"):
            return 0
        if line.startswith("/"):
            chat.obey(line)
        elif line:
            chat.answer(line)


class Chat:
    """The commands and the bookkeeping around one `Conversation`."""

    def __init__(self, talk: Conversation, flat: bool = False, knows_prompts: bool = True):
        """flat: a reply is one line, whatever line breaks the model makes. knows_prompts: the model
        has learned from dialogues with system prompts."""
        self.talk = talk
        self.flat = flat
        self.knows_prompts = knows_prompts
        self.lines: list[str] = []  # what was said, user and model in turn
        self.reply_seconds = 0.0
        self.first_seconds = 0.0  # until the first piece of the reply

    def answer(self, text: str) -> None:
        """Print the reply to text as it comes; Ctrl-C ends it there and keeps what was said."""
        self.talk.say(text)
        said = ""
        start = time.perf_counter()
        try:
            for piece in self.talk.reply():
                if not said:
                    self.first_seconds = time.perf_counter() - start
                said += piece
                print(one_line(piece) if self.flat else piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        self.reply_seconds = time.perf_counter() - start
        self.lines += [text, said]

    def obey(self, line: str) -> None:
        """Do what a line that begins with / asks for."""
        name, _, rest = line.partition(" ")
        if name == "/help":
            print(HELP.format(keys=", ".join(asdict(self.talk.settings))))
        elif name == "/reset":
            self.talk.reset()
            self.lines = []
            print("(new conversation)")
        elif name == "/undo":
            self.undo()
        elif name == "/set":
            self.set(rest.split())
        elif name == "/system":
            self.set_system(rest.strip())
        elif name == "/stats":
            self.stats()
        elif name == "/save":
            self.save(rest.strip())
        else:
            print(f"there is no command {name}; /help lists them")

    def undo(self) -> None:
        """Take back the last line and its reply."""
        if self.talk.undo():
            self.lines = self.lines[:-2]
            print("(took back the last exchange)")
        else:
            print("(nothing to take back)")

    def set(self, changes: list[str]) -> None:
        """Change sampling settings for what follows; without arguments show them."""
        wrong = [change for change in changes if "=" not in change]
        if wrong:
            print(f"/set KEY=VALUE ..., not {wrong[0]}")
            return
        before = [f"{key}={value}" for key, value in asdict(self.talk.settings).items()]
        try:
            new = settings.load(SampleSettings, before + changes)
        except UserError as error:
            print(error)
            return
        if any(change.startswith("seed=") for change in changes):
            self.talk.generator.manual_seed(new.seed)
        self.talk.settings = new
        print("  ".join(f"{key}={value}" for key, value in asdict(new).items()))

    def set_system(self, text: str) -> None:
        """Set the system prompt, or take it away."""
        try:
            self.talk.set_system(text)
        except UserError as error:
            print(error)
            return
        print("(system prompt set)" if text else "(no system prompt)")
        if text and not self.knows_prompts:
            print("(this model was trained without system prompts: it may not follow one)")

    def stats(self) -> None:
        """Print how full the context is, and how fast the last reply was."""
        talk = self.talk
        speed = talk.reply_tokens / self.reply_seconds if self.reply_seconds else 0.0
        context = f"context {len(talk.ids)} of {talk.block_size} tokens, {len(talk.turns)} turns"
        first = f"first after {self.first_seconds:.3f} s"
        print(f"{context}; last reply {talk.reply_tokens} tokens, {speed:.0f} tokens/s, {first}")

    def save(self, name: str) -> None:
        """Append the conversation to a file: to one whose name ends in .jsonl with its roles, to
        others one utterance a line, with a blank line after it."""
        if not name or not self.lines:
            print("/save FILE, after something was said")
            return
        with_roles = name.endswith(".jsonl")
        text = self.as_json() if with_roles else self.as_text()
        try:
            with open(name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            print(f"could not save: {error}")
            return
        print(f"(saved {len(self.lines)} lines in {name})")
        if self.talk.system and not with_roles:
            print("(without the system prompt, which /save FILE.jsonl keeps)")

    def as_text(self) -> str:
        said = [" ".join(line.split()) for line in self.lines]
        text = "\n".join(line for line in said if line)  # a stopped reply may be empty
        return f"{text}\n\n"

    def as_json(self) -> str:
        """{"messages": [{"role": "user", "content": "hi"}, ...]}"""
        roles = itertools.cycle(["user", "assistant"])
        turns = list(zip(roles, self.lines, strict=False))
        if self.talk.system:
            turns.insert(0, ("system", self.talk.system))
        messages = [{"role": role, "content": content} for role, content in turns if content]
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        return f"{line}\n"


def line_editing() -> None:
    """Arrow keys and history at the prompt, where Python has readline (not on Windows)."""
    try:
        import atexit
        import readline

        history = Path.home() / ".small_gpt_history"
        history.touch(mode=0o600)  # nobody else's to read
        readline.read_history_file(history)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, history)
    except (ImportError, OSError, RuntimeError):  # RuntimeError: the user has no home folder
        pass


if __name__ == "__main__":
    console.run(main)
