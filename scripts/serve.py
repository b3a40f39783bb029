"""Serve a run over HTTP: OpenAI's chat completions and a chat page, or the labels of a classifier.

    python scripts/serve.py checkpoints/quickstart          a page at http://127.0.0.1:8000
    python scripts/serve.py checkpoints/sentiment           POST /v1/classify
    KEY=... python scripts/serve.py checkpoints/quickstart host=0.0.0.0 key_env=KEY names=[gpu1.lan]

Only this computer can reach it unless a key is set. Ctrl-C stops it. docs/serving.md has examples.
"""

import ipaddress
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the repository's root

from smallgpt import console, load_chat, load_classifier, settings
from smallgpt.console import UserError
from smallgpt.inference import Precision
from smallgpt.runs import checkpoint
from smallgpt.sampling import SampleSettings
from smallgpt.settings import Count, Device, PositiveFloat
from smallgpt.weights.pretrained import is_foreign

PAGE = Path(__file__).with_name("chat.html")
LOOPBACK = ["127.0.0.1", "localhost", "::1"]


@dataclass
class ServeSettings:
    checkpoint: str = ""  # what chat.py opens, or a classifier: its run or step folder
    host: str = "127.0.0.1"  # the address to listen at; 0.0.0.0 = all of this computer
    port: Annotated[int, Ge(0), Le(65535)] = 8000  # 0 = a free one
    key_env: str = ""  # the environment variable that holds the key; "" = no key
    names: list[str] = field(default_factory=list)  # other hosts that it is reached by
    waiting: Count = 8  # requests that may wait for the one before; more are told to come back
    max_seconds: PositiveFloat = 60.0  # the longest that the model works for a request
    device: Device = "auto"  # auto = a GPU if there is one
    dtype: Precision = "auto"  # as in chat.py
    sample: SampleSettings = field(default_factory=SampleSettings)  # where a request has none

    def check(self) -> list[str]:
        """Problems with these settings, in plain words."""
        if not self.key_env and not is_loopback(self.host):
            return [
                f"host={self.host} lets other computers in: set a key, "
                "KEY=... python scripts/serve.py ... key_env=KEY"
            ]
        return []


def main() -> None:
    s = settings.load(ServeSettings, settings.name_checkpoint(sys.argv[1:]), doc=__doc__)
    if not s.checkpoint:
        raise UserError("which model? python scripts/serve.py checkpoints/<run>")
    try:
        from smallgpt.server import listen
        from smallgpt.server.app import create_app
        from smallgpt.server.engine import Engine
    except ModuleNotFoundError as error:
        raise UserError(
            f"the server needs {error.name}: pip install -r requirements-serve.txt"
        ) from None

    key = read_key(s.key_env) if s.key_env else ""
    socket = listen.bind(s.host, s.port)
    if is_classifier(s.checkpoint):
        model = load_classifier(s.checkpoint, s.device, s.dtype)
        offer = "POST /v1/classify"
    else:
        model = load_chat(s.checkpoint, s.sample, s.device, s.dtype)
        offer = "a chat page, and POST /v1/chat/completions"
    names = [*LOOPBACK, s.host, *s.names]
    page = PAGE.read_text(encoding="utf-8")
    engine = Engine(s.waiting, s.max_seconds)
    server = listen.make_server(create_app(model, engine, page, names, key))

    _, port, *_ = socket.getsockname()
    host = f"[{s.host}]" if ":" in s.host else s.host
    print(f"{model.description}.")
    print(f"http://{host}:{port} has {offer}. Ctrl-C stops it.", flush=True)
    server.run(sockets=[socket])


def is_classifier(path: str) -> bool:
    """Is there a run of sentiment_train.py? UserError if there is nothing that can be opened."""
    return not is_foreign(path) and "head" in checkpoint.required(path).meta


def is_loopback(host: str) -> bool:
    """Can only this computer reach an address?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(variable: str) -> str:
    """The key in an environment variable. The messages do not repeat what was given: it might be
    the key itself."""
    key = os.environ.get(variable, "")
    if not key:
        raise UserError(
            "key_env must name an environment variable that holds the key: "
            "KEY=... python scripts/serve.py ... key_env=KEY"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("the key must be of ASCII letters, digits and signs, without spaces")
    return key


if __name__ == "__main__":
    console.run(main)
