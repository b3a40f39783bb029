"""Talk to a pretrained model.

    python chat.py checkpoints/quickstart                 the best checkpoint of a run, or one step folder
    python chat.py config/chat300M.yaml                   the same, with the settings in a file
    python chat.py checkpoints/quickstart sample.temperature=0.5 sample.top_k=50
    echo "你好" | python chat.py checkpoints/quickstart    one reply a line

Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands.
"""

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from smallgpt import console, hardware, settings
from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.sampling import Conversation, SampleSettings

HELP = """\
  /reset              forget the conversation (also: flush)
  /undo               take back your last line and its reply
  /set KEY=VALUE ...  change the sampling: {keys}
  /stats              speed, and how full the context is
  /save FILE          add the conversation to FILE, in the corpus format
  /exit               leave (also: exit, Ctrl-D)
  Ctrl-C              stop a reply"""


@dataclass
class ChatSettings:
    checkpoint: str = ""  # run folder (its best checkpoint) or step folder
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto = a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # precision of the weights
    sample: SampleSettings = field(default_factory=SampleSettings)  # how tokens are chosen


class Chat:
    """The commands and the bookkeeping around one `Conversation`."""

    def __init__(self, talk: Conversation):
        self.talk = talk
        self.lines: list[str] = []  # what was said, user and model in turn
        self.reply_seconds, self.first_seconds = 0.0, 0.0

    def answer(self, text: str) -> None:
        """Print the reply to text as it comes; Ctrl-C ends it there and keeps what was said."""
        self.talk.say(text)
        said, start = "", time.perf_counter()
        try:
            for piece in self.talk.reply():
                if not said:
                    self.first_seconds = time.perf_counter() - start
                said += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        self.reply_seconds = time.perf_counter() - start
        self.lines += [text, said]

    def command(self, line: str) -> bool:
        """Obey a command; False means leave."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            print(HELP.format(keys=", ".join(asdict(self.talk.settings))))
        elif name == "/reset":
            self.talk.reset()
            self.lines = []
            print("(new conversation)")
        elif name == "/undo":
            done = self.talk.undo()
            self.lines = self.lines[:-2] if done else self.lines
            print("(took back the last exchange)" if done else "(nothing to take back)")
        elif name == "/set":
            self.set(rest.split())
        elif name == "/stats":
            speed = self.talk.reply_tokens / self.reply_seconds if self.reply_seconds else 0.0
            print(
                f"context {len(self.talk.ids)} of {self.talk.block_size} tokens, {len(self.talk.turns)} turns; last "
                f"reply {self.talk.reply_tokens} tokens, {speed:.0f} tokens/s, first after {self.first_seconds:.3f} s"
            )
        elif name == "/save":
            self.save(rest.strip())
        else:
            print(f"there is no command {name}; /help lists them")
        return True

    def set(self, changes: list[str]) -> None:
        """Change sampling settings for what follows; without arguments show them."""
        if wrong := [c for c in changes if "=" not in c]:
            print(f"/set KEY=VALUE ..., not {wrong[0]}")
            return
        before = [f"{k}={v}" for k, v in asdict(self.talk.settings).items()]
        try:
            new = settings.load(SampleSettings, before + changes)
        except UserError as e:
            print(e)
            return
        if any(c.startswith("seed=") for c in changes):
            self.talk.generator.manual_seed(new.seed)
        self.talk.settings = new
        print("  ".join(f"{k}={v}" for k, v in asdict(new).items()))

    def save(self, name: str) -> None:
        """Append the conversation to a file: one utterance a line, a blank line after it."""
        if not name or not self.lines:
            print("/save FILE, after something was said")
            return
        try:
            with open(name, "a", encoding="utf-8") as f:
                said = [" ".join(line.split()) for line in self.lines]
                f.write(
                    "\n".join(line for line in said if line) + "\n\n"
                )  # a stopped reply may be empty
            print(f"(saved {len(self.lines)} lines in {name})")
        except OSError as e:
            print(f"could not save: {e}")


def line_editing(history: Path) -> None:
    """Arrow keys and history at the prompt, where Python has readline (not on Windows)."""
    try:
        import atexit
        import readline

        history.touch(mode=0o600)  # nobody else's to read
        readline.read_history_file(history)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, history)
    except (ImportError, OSError):
        pass


def main() -> int:
    def is_setting(word: str) -> bool:
        return "=" in word or word.startswith("-") or word.endswith((".yaml", ".yml"))

    if len(models := [word for word in sys.argv[1:] if not is_setting(word)]) > 1:
        raise UserError(f"one model at a time, not {' and '.join(models)}")
    argv = [word if is_setting(word) else f"checkpoint={word}" for word in sys.argv[1:]]
    s = settings.load(ChatSettings, argv, doc=__doc__)
    if not s.checkpoint:
        raise UserError(
            "which model? python chat.py checkpoints/<run>, a folder that train.py has written"
        )
    device = hardware.choose_device(s.device)
    dtype, _ = hardware.choose_dtype(s.dtype, device)
    found, module, tokenizer = checkpoint.open_model(s.checkpoint)
    module = module.to(device, dtype).eval()
    chat = Chat(Conversation(module, tokenizer, s.sample))
    tty = sys.stdin.isatty()
    if tty:
        n = sum(p.numel() for p in module.parameters())
        print(
            f"{found.path}: {n / 1e6:.1f}M parameters on {device.type}, {str(dtype)[6:]}. /help lists the commands."
        )
        line_editing(Path.home() / ".small_gpt_history")
    while True:
        try:
            line = input("> " if tty else "").strip()
        except EOFError:
            print() if tty else None
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            continue
        line = {"flush": "/reset", "exit": "/exit"}.get(line, line)
        if line.startswith("/"):
            if not chat.command(line):
                return 0
        elif line:
            chat.answer(line)


if __name__ == "__main__":
    console.run(main)
