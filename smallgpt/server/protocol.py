"""What goes over the wire, in the JSON of OpenAI's API: requests with their bounds, and answers.

https://platform.openai.com/docs/api-reference/chat has the fields. A request that holds another one
is refused: who asks for tools must not believe to have them.
"""

import secrets
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, StringConstraints

from smallgpt.inference import Prediction, Turn
from smallgpt.sampling import SampleSettings
from smallgpt.turns import Role

MAX_MESSAGES = 2000
MAX_TEXTS = 1000
MAX_TOKENS = 1_000_000  # a reply ends with the block, too
INT64 = 2**63

Name = Annotated[str, StringConstraints(max_length=200)]
Temperature = Annotated[float, Ge(0), Le(2)]
TopP = Annotated[float, Gt(0), Le(1)]
TopK = Annotated[int, Ge(0), Le(MAX_TOKENS)]
Penalty = Annotated[float, Ge(0.01), Le(100)]
Tokens = Annotated[int, Ge(1), Le(MAX_TOKENS)]
Seed = Annotated[int, Ge(-INT64), Le(INT64 - 1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Stops = Annotated[list[Stop], MaxLen(4)]
Texts = Annotated[list[str], MinLen(1), MaxLen(MAX_TEXTS)]
Zero = Annotated[float, Ge(0), Le(0)]  # a setting that is accepted where it changes nothing
One = Annotated[int, Ge(1), Le(1)]


class Refusal(Exception):
    """A request that is not served: its HTTP status, why not, and the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def response(self) -> JSONResponse:
        """The error in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": encodable(str(self)), "type": kind, "param": None, "code": self.code}
        if self.param is not None:
            error["param"] = encodable(self.param)
        return JSONResponse({"error": error}, self.status, self.headers)


def encodable(text: str) -> str:
    """The text with ? for halves of characters, which a client may write into JSON as \\ud800."""
    return text.encode("utf-8", "replace").decode("utf-8")


# --- requests -------------------------------------------------------------------------------------


class Body(BaseModel):
    """A JSON object without other fields, and of exactly these types: "1" is no number."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Name | None = None  # of who speaks; it is not read

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool = False


class ChatRequest(Body):
    messages: Annotated[list[Message], MinLen(1), MaxLen(MAX_MESSAGES)]
    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    repetition_penalty: Penalty | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None  # the newer name
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    # what clients send although it changes nothing
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    user: Name | None = None

    @property
    def stops(self) -> list[str]:
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop or []

    def sample(self, default: SampleSettings) -> SampleSettings:
        """How tokens are chosen: the server's settings where the request has none."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
        }
        changes = {key: value for key, value in given.items() if value is not None}
        settings = replace(default, **changes)
        for problem in settings.check():
            raise Refusal(400, problem, "temperature")
        return settings

    def dialogue(self) -> tuple[str | None, list[Turn]]:
        """The system prompt, None if there is none, and the turns: user, assistant, ..., user."""
        messages = self.messages
        system = None
        first = 0  # of the turns
        if messages[0].role in ("system", "developer"):
            system = messages[0].text
            first = 1
        turns = []
        due: Role = "user"
        for i, message in enumerate(messages[first:], start=first):
            if message.role != due:
                raise Refusal(
                    400,
                    f"messages.{i} is of the {message.role}, and should be of the {due}: at most "
                    "one system message comes first, then user and assistant take turns",
                    f"messages.{i}.role",
                )
            if due == "user" and not message.text.strip():
                where = f"messages.{i}"
                raise Refusal(400, f"{where} holds no text", f"{where}.content")
            turns.append(Turn(due, message.text))
            due = "assistant" if due == "user" else "user"
        if due == "user":
            raise Refusal(400, "the last message must be of the user", "messages")
        return system, turns


class ClassifyRequest(Body):
    input: str | Texts
    model: Name | None = None

    def texts(self) -> list[str]:
        """The texts, none of them empty."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        for i, text in enumerate(texts):
            if not text.strip():
                where = "input" if isinstance(self.input, str) else f"input.{i}"
                raise Refusal(400, f"{where} holds no text", where)
        return texts


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """The tokens of a reply."""

    prompt: int  # that the model has read; of a long dialogue the oldest turns are left out
    reply: int

    def json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.reply,
            "total_tokens": self.prompt + self.reply,
        }


class ChatAnswer:
    """The JSON of one reply, whole or in chunks."""

    def __init__(self, model: str):
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": finish,
            "logprobs": None,
        }
        return {
            **self.head("chat.completion"),
            "choices": [choice],
            "usage": usage.json(),
        }

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": finish,
            "logprobs": None,
        }
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {
            **self.head("chat.completion.chunk"),
            "choices": [],
            "usage": usage.json(),
        }


def models_json(model: str, created: int) -> dict[str, Any]:
    """The list of the one model."""
    entry = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "small-gpt",
    }
    return {"object": "list", "data": [entry]}


def predictions_json(model: str, predictions: list[Prediction]) -> dict[str, Any]:
    """The labels of texts, in order. OpenAI's API has no such answer; its lists look like this."""
    data = []
    for i, found in enumerate(predictions):
        entry = {
            "label": found.label,
            "probability": found.probability,
            "probabilities": found.probabilities,
        }
        if found.number is not None:
            entry = {"number": found.number}
        data.append({"index": i, **entry})
    return {"object": "list", "model": model, "data": data}
