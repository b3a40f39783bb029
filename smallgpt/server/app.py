"""The routes: OpenAI's chat completions and models, labels, health, and the page."""

import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from smallgpt.inference import Chat, Classifier
from smallgpt.sampling import SampleSettings
from smallgpt.server.engine import Completion, Engine, classify
from smallgpt.server.guard import Guard
from smallgpt.server.protocol import (
    ChatAnswer,
    ChatRequest,
    ClassifyRequest,
    Refusal,
    encodable,
    models_json,
    predictions_json,
)


def create_app(
    model: Chat | Classifier, engine: Engine, page: str, names: Collection[str], key: str = ""
) -> Guard:
    """The ASGI application that serves a model.

    engine: its thread and queue. page: the HTML of the chat. names: the hosts that the server is
    reached by. key: what requests to /v1/ must hold, "" for none."""
    app = FastAPI(openapi_url=None)
    app.exception_handler(Refusal)(refuse)
    app.exception_handler(RequestValidationError)(explain_body)
    app.exception_handler(HTTPException)(explain_status)
    app.exception_handler(Exception)(apologise)
    app.get("/health")(health)
    service = Service(model, engine)
    app.get("/v1/models")(service.models)
    if isinstance(model, Chat):
        chat = ChatService(model, service, page)
        app.post("/v1/chat/completions")(chat.complete)
        app.get("/")(chat.show_page)
    else:
        app.post("/v1/classify")(ClassifyService(model, service).classify)
    return Guard(app, names, key)


async def health() -> JSONResponse:
    return JSONResponse({"status": "ok"})


class Service:
    """What both kinds of model share."""

    def __init__(self, model: Chat | Classifier, engine: Engine):
        self.model = encodable(model.name)
        self.engine = engine
        self.created = int(time.time())

    async def models(self) -> JSONResponse:
        return JSONResponse(models_json(self.model, self.created))

    def check_model(self, asked: str | None) -> None:
        """Refusal of a request for another model. One that names none gets this one."""
        if asked not in (None, self.model):
            there = f"there is no model of this name here, but {self.model}"
            raise Refusal(404, there, "model", "model_not_found")


class ChatService:
    def __init__(self, chat: Chat, service: Service, page: str):
        self.chat = chat
        self.page = HTMLResponse(page, headers=page_headers(page))
        self.service = service
        self.default: SampleSettings = chat.talk.settings

    async def show_page(self) -> Response:
        """GET /"""
        return self.page

    async def complete(self, request: ChatRequest) -> Response:
        """POST /v1/chat/completions"""
        self.service.check_model(request.model)
        reply = Completion(self.chat, request, self.default, self.service.engine.seconds)
        answer = ChatAnswer(self.service.model)
        if request.stream:
            options = request.stream_options
            has_usage = options is not None and options.include_usage
            return EventStream(self.events(reply, answer, has_usage))
        text = ""
        async with aclosing(self.service.engine.steps(reply.pieces())) as pieces:
            async for piece in pieces:
                text += piece
        return JSONResponse(answer.whole(text, reply.finish, reply.usage))

    async def events(
        self, reply: Completion, answer: ChatAnswer, has_usage: bool
    ) -> AsyncGenerator[str, None]:
        """The reply as the data of server-sent events."""
        begun = False
        async with aclosing(self.service.engine.steps(reply.pieces())) as pieces:
            async for piece in pieces:
                if not begun:
                    begun = True
                    yield as_json(answer.chunk({"role": "assistant", "content": ""}))
                if piece:
                    yield as_json(answer.chunk({"content": piece}))
        yield as_json(answer.chunk({}, reply.finish))
        if has_usage:
            yield as_json(answer.usage_chunk(reply.usage))
        yield "[DONE]"


class ClassifyService:
    def __init__(self, classifier: Classifier, service: Service):
        self.classifier = classifier
        self.service = service

    async def classify(self, request: ClassifyRequest) -> JSONResponse:
        """POST /v1/classify"""
        self.service.check_model(request.model)
        work = classify(self.classifier, request.texts(), self.service.engine.seconds)
        found = []
        async with aclosing(self.service.engine.steps(work)) as steps:
            async for predictions in steps:
                found += predictions
        return JSONResponse(predictions_json(self.service.model, found))


class EventStream(Response):
    """Server-sent events. What goes wrong before the first one is answered with its own status."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]):
        super().__init__()
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            event = await anext(self.events)
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await send(event_message(event))
            async for event in self.events:
                await send(event_message(event))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def event_message(data: str) -> dict[str, Any]:
    body = f"data: {data}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


# --- errors ---------------------------------------------------------------------------------------


async def refuse(_: Request, refusal: Refusal) -> JSONResponse:
    return refusal.response()


async def explain_body(_: Request, error: RequestValidationError) -> JSONResponse:
    """400: the first field that is wrong, and how."""
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return Refusal(400, "the body is no valid JSON").response()
    _, *path = problem["loc"]  # the first is "body"
    param = ".".join(map(str, path))[:200] or "body"
    wrong = problem["msg"]
    if problem["type"] == "extra_forbidden":
        wrong = "this server has no such setting"
    return Refusal(400, f"{param}: {wrong}", param).response()


async def explain_status(request: Request, error: HTTPException) -> JSONResponse:
    """What the framework found: no such path or method, a body that cannot be decoded."""
    message = error.detail
    if error.status_code in (404, 405):
        served = []
        for route in request.app.routes:
            served += [f"{method} {route.path}" for method in sorted(route.methods)]
        message = f"this server answers only {', '.join(served)}"
    return Refusal(error.status_code, message, headers=error.headers).response()


async def apologise(_: Request, error: Exception) -> JSONResponse:
    """500. The server's log has the traceback."""
    return Refusal(500, "an error of this server; its log says more").response()


def page_headers(page: str) -> dict[str, str]:
    """The page may run its own script and style, ask this server, and do nothing else."""
    sources = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest())
        sources[tag] = f"'sha256-{digest.decode()}'"
    policy = [
        "default-src 'none'",
        f"script-src {sources['script']}",
        f"style-src {sources['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return {"Content-Security-Policy": "; ".join(policy), "Referrer-Policy": "no-referrer"}
