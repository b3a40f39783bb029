"""uvicorn, with limits on clients that connect and then say nothing."""

import asyncio
import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from smallgpt.console import UserError
from smallgpt.server.guard import Guard

HEADER_SECONDS = 10.0  # until a connection has sent the headers of its next request
CONNECTIONS = 100  # at once; one more is answered by 503


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP. A connection whose next request does not begin in time is closed, also one
    that sends its headers a byte at a time."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()  # it would hold what the connection held until its time has come
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.timer.cancel()
        if not self.transport.is_closing():
            self.expect_request()
        super().on_response_complete()

    def expect_request(self) -> None:
        """Look in a while whether another request than the last one has begun."""
        last = self.cycle
        self.timer = self.loop.call_later(HEADER_SECONDS, self.close_if_silent, last)

    def close_if_silent(self, last: object) -> None:
        if self.cycle is last:
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address; port 0 takes a free one. UserError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}, port {port} ({error.strerror}): give another one, port=8001"
        ) from None


def make_server(app: Guard) -> uvicorn.Server:
    """The server: `run(sockets=[...])` serves until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)
