"""Who may ask, and with what: everything that is refused before a request is read.

    400  a Host that is not ours: a page of another site whose name was made to point here (DNS
         rebinding)
    403  an Origin that is not ours: a page of another site
    401  no key, where the server has one
    415  a body that is not application/json: a form of another site's page needs no permission of
         the browser, JSON does
    413  a body of more than 1 MiB
    408  a body that takes longer than 10 seconds

A client that leaves, or that does not take what it is sent, has its request cancelled.
"""

import asyncio
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smallgpt.server.protocol import Refusal

MAX_BODY = 1 << 20  # bytes
BODY_SECONDS = 10.0  # until the whole body is there
SEND_SECONDS = 30.0  # until a client has taken what it was sent
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class ClientLeft(Exception):
    """Nobody is there to be answered."""


class Guard:
    """An ASGI application around another one, which sees only requests that may be answered, each
    with its whole body.

    names: the hosts that the server is reached by. key: "" if it asks for none."""

    def __init__(self, app: ASGIApp, names: Collection[str], key: str):
        self.app = app
        self.names = {name.lower() for name in names}
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self.check_sender(scope, headers)
            body = b""
            if scope["method"] == "POST":
                body = await read_json(headers, receive)
            await self.attend(scope, body, receive, send)
        except Refusal as refusal:
            await refusal.response()(scope, receive, guarded(send))
        except ClientLeft:
            pass

    def check_sender(self, scope: Scope, headers: Headers) -> None:
        """Refusal of a request that comes by another name, from another page, or without the
        key."""
        host = headers.get("host", "")
        if host_name(host) not in self.names:
            raise Refusal(
                400, "this server is not reached by this name: start it with names=[NAME, ...]"
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in own_origins(host):
            raise Refusal(403, "pages of other sites may not ask this server")
        if self.key and scope["path"].startswith("/v1/"):
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + self.key):
                wrong = "the key is missing or wrong: send the header Authorization: Bearer KEY"
                challenge = {"WWW-Authenticate": "Bearer"}
                raise Refusal(401, wrong, code="invalid_api_key", headers=challenge)

    async def attend(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let the application answer, until the client has left."""
        answering = asyncio.create_task(self.app(scope, replay(body), guarded(send)))
        leaving = asyncio.create_task(wait_until_left(receive))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            has_left = not answering.done()
            answering.cancel()
            leaving.cancel()
        try:
            await answering
        except asyncio.CancelledError:
            if not has_left:
                raise


def host_name(host: str) -> str:
    """localhost:8000 -> localhost, [::1]:8000 -> ::1; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def own_origins(host: str) -> list[str]:
    """The origins of this server's own page, with and without a proxy before it that speaks TLS."""
    return [f"http://{host.lower()}", f"https://{host.lower()}"]


async def read_json(headers: Headers, receive: Receive) -> bytes:
    """The whole body. Refusal of one that is no JSON, too large or too slow."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or "content-encoding" in headers:
        raise Refusal(415, "send plain JSON, with the header Content-Type: application/json")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY:
        raise too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await read_body(receive)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_SECONDS:g} seconds") from None


async def read_body(receive: Receive) -> bytes:
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise too_large()
        more = message.get("more_body", False)
    return bytes(body)


def too_large() -> Refusal:
    return Refusal(413, f"a request may have at most {MAX_BODY} bytes")


def replay(body: bytes) -> Receive:
    """An ASGI `receive` that gives the body, and then nothing any more."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not rest:
            await asyncio.Event().wait()  # until the task is cancelled
        return rest.pop()

    return receive


def guarded(send: Send) -> Send:
    """An ASGI `send` that adds the headers that every answer has. ClientLeft if the client does not
    take what it is sent."""

    async def send_guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientLeft from None

    return send_guarded


async def wait_until_left(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
