"""The model at work: for one request at a time, step by step, until nobody listens any more."""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch

from smallgpt.console import UserError
from smallgpt.inference import Chat, Classifier, Prediction
from smallgpt.sampling import SampleSettings
from smallgpt.server.protocol import ChatRequest, Refusal, Usage

T = TypeVar("T")
END = object()  # of the steps of a generator
TEXTS_A_STEP = 16  # a classifier looks up from its work after so many


class Engine:
    """One thread that works, and a queue before it.

    A client that leaves stops its work within one step: whoever closes `steps`, or is cancelled in
    it, closes the generator that does the work."""

    def __init__(self, waiting: int = 8, seconds: float = 60.0):
        self.waiting = waiting  # requests that may wait; one more is refused
        self.seconds = seconds  # the longest that the model may work for one
        self.inside = 0  # requests that wait or are worked for
        self.turn = asyncio.Lock()  # first come, first served
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    async def steps(self, work: Generator[T, None, None]) -> AsyncGenerator[T, None]:
        """What the generator yields, each step done in the thread. Refusal 429 if it would have to
        wait behind too many others."""
        if self.inside > self.waiting:
            many = "the model is busy and its queue is full: try again in a few seconds"
            raise Refusal(429, many, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self.inside += 1
        loop = asyncio.get_running_loop()
        try:
            async with self.turn:
                while True:
                    step = await loop.run_in_executor(self.thread, next, work, END)
                    if step is END:
                        return
                    yield step
        finally:
            self.inside -= 1
            self.thread.submit(work.close)  # in the thread, after the step that it may be in


class Completion:
    """The reply to one request."""

    def __init__(self, chat: Chat, request: ChatRequest, default: SampleSettings, seconds: float):
        self.chat = chat
        self.system, self.turns = request.dialogue()
        self.sample = request.sample(default)
        self.seed = request.seed
        self.stop = StopFilter(request.stops)
        self.seconds = seconds  # the longest that it may take
        self.finish = "length"  # why it ended: "stop" if the model or a stop string ended it
        self.usage = Usage(0, 0)

    def pieces(self) -> Generator[str, None, None]:
        """The reply, a piece for each token. Many are "": a token that completes no character, or
        that may begin a stop string."""
        end = time.monotonic() + self.seconds
        talk = self.chat.talk
        others = talk.settings, talk.generator
        talk.settings = self.sample
        if self.seed is not None:
            talk.generator = torch.Generator(talk.device).manual_seed(self.seed)
        try:
            self.chat.set_history(self.turns, self.system)
            with closing(self.chat.pieces()) as pieces:
                for piece in pieces:
                    yield self.stop.push(piece)
                    if self.stop.found or time.monotonic() > end:
                        break
        except UserError as error:
            raise Refusal(400, str(error), "messages") from None
        finally:
            talk.settings, talk.generator = others  # the generator of all requests without a seed
        if talk.is_complete or self.stop.found:
            self.finish = "stop"
        self.usage = Usage(talk.reply_begin, talk.reply_tokens)
        yield self.stop.flush()


class StopFilter:
    """Lets the text through that comes before the first stop string. It holds back what may be the
    beginning of one: after "a b" with the stop " bc", " b"."""

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is now known to come before any stop string."""
        text = self.held + piece
        begins = [text.find(stop) for stop in self.stops if stop in text]
        if begins:
            self.found = True
            self.held = ""
            return text[: min(begins)]
        sure = len(text) - self.unsure(text)
        self.held = text[sure:]
        return text[:sure]

    def unsure(self, text: str) -> int:
        """How many of the last characters begin a stop string."""
        longest = 0
        for stop in self.stops:
            for n in range(1, len(stop)):
                if text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest

    def flush(self) -> str:
        """What was held back, at the end of the reply."""
        return self.held


def classify(
    classifier: Classifier, texts: list[str], seconds: float
) -> Generator[list[Prediction], None, None]:
    """The predictions of the texts, some at a time. Refusal 503 if they take too long."""
    end = time.monotonic() + seconds
    for first in range(0, len(texts), TEXTS_A_STEP):
        if time.monotonic() > end:
            raise Refusal(503, f"this took longer than {seconds:g} seconds: send fewer texts")
        yield classifier(texts[first : first + TEXTS_A_STEP])
