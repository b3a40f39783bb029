"""scripts/serve.py as programs and people use it: over a socket, on this computer."""

import asyncio
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server is an extra: requirements-serve.txt")
pytest.importorskip("uvicorn", reason="the server is an extra: requirements-serve.txt")

from helpers import free_port, wait_for
from scripts import serve
from smallgpt import SampleSettings, load_chat, load_classifier, sampling
from smallgpt.inference import Chat, Classifier
from smallgpt.server import guard, listen
from smallgpt.server.app import create_app
from smallgpt.server.engine import Engine, StopFilter

PAGE = serve.PAGE.read_text(encoding="utf-8")
BLOCK = 64
COMPLETE = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> dict:
        return json.loads(self.text)

    @property
    def error(self) -> dict:
        """The error, which must have OpenAI's shape."""
        (error,) = self.json.values()
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        return error

    @property
    def reply(self) -> str:
        assert self.status == 200, self.text
        return self.json["choices"][0]["message"]["content"]

    @property
    def events(self) -> list[dict]:
        """The chunks of a stream, which must end as OpenAI's do."""
        *events, end = re.findall(r"data: (.*)\n\n", self.text)
        assert end == "[DONE]"
        return [json.loads(event) for event in events]


@dataclass
class Server:
    """A server in a thread of this process."""

    model: Chat | Classifier
    key: str = ""
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self):
        app = create_app(self.model, self.engine, PAGE, serve.LOOPBACK, self.key)
        self.uvicorn = listen.make_server(app)
        self.socket = listen.bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],))
        self.thread.start()
        wait_for(lambda: self.uvicorn.started, "the server")

    def stop(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(
        self, method: str, path: str, body: object = None, headers: dict | None = None
    ) -> Answer:
        """Send a request; a body that is no bytes is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = self.connect()
        connection.request(method, path, body, headers or (JSON if body is not None else {}))
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.getheaders()), response.read().decode())
        connection.close()
        return answer

    def say(self, *said: str, **settings: object) -> Answer:
        """Ask for the reply to user, assistant, ..., user."""
        return self.ask("POST", COMPLETE, request(*said, **settings))


def request(*said: str, **settings: object) -> dict:
    """A request for the reply to user, assistant, ..., user."""
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return {"messages": messages, "temperature": 0, **settings}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run, tiny) -> Path:
    out = tmp_path_factory.mktemp("serve")
    shape = dict(
        tokenizer__kind="bpe",
        tokenizer__vocab_size=400,
        model__block_size=BLOCK,
        batch_tokens=8 * BLOCK,
    )
    args = tiny(out, run="r", max_steps=3, prompts="[]", **shape)
    result = run("train", args)
    assert result.status == 0, result.err
    return out / "r"


@pytest.fixture(scope="module")
def chat(trained) -> Chat:
    return load_chat(trained, SampleSettings(max_tokens=20), "cpu", "float32")


@pytest.fixture
def serving() -> Iterator[Callable[..., Server]]:
    """serving(model, key=..., engine=...) -> a running server."""
    servers = []

    def serving(model: Chat | Classifier, **options) -> Server:
        servers.append(Server(model, **options))
        return servers[-1]

    yield serving
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(chat) -> Iterator[Server]:
    server = Server(chat)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    """The client that OpenAI publishes. It does not try again."""
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{server.port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


class Gate:
    """Stands before the model: it reads as many tokens as a test has let through. Its replies end
    at max_tokens."""

    def __init__(self, monkeypatch):
        self.reads = 0
        self.let_through = threading.Semaphore(0)
        read = sampling.read

        def read_when_allowed(*args):
            self.reads += 1
            assert self.let_through.acquire(timeout=30)
            return read(*args)

        monkeypatch.setattr(sampling, "read", read_when_allowed)
        monkeypatch.setattr(
            sampling, "pick", lambda *_: ord("a")
        )  # the byte, in any tokenizer of ours


@pytest.fixture
def gate(monkeypatch) -> Gate:
    return Gate(monkeypatch)


# --- replies --------------------------------------------------------------------------------------


def test_replies_are_those_of_chat_py(server, run, trained):
    """Of a dialogue that outgrows the block, the server reads other tokens than chat.py."""
    lines = [f"what is {c} {i}?" for i, c in enumerate(["red", "白色", "龘 blue", "green"] * 4)]
    args = ["device=cpu", "dtype=float32", "sample.temperature=0", "sample.max_tokens=20"]
    typed = run("chat", [trained, *args], stdin="\n".join(lines))
    assert typed.status == 0, typed.err
    said = []
    for line, reply in zip(lines, typed.out.splitlines(), strict=True):
        said.append(line)
        whole = server.say(*said)
        streamed = server.say(*said, stream=True)
        pieces = [event["choices"][0]["delta"].get("content", "") for event in streamed.events]
        assert "".join(pieces) == whole.reply == reply
        said.append(whole.reply)
    assert whole.json["usage"]["prompt_tokens"] > BLOCK / 2, "the block was never full"
    assert len(set(typed.out.splitlines())) > 3, "or else nothing is compared"


def test_only_what_is_new_is_read(server, monkeypatch):
    """A dialogue of a hundred turns is read from its beginning at every turn."""
    read = sampling.read
    lengths = []

    def counted(model, cache, dialogues):
        (talk,) = dialogues
        lengths.append(len(talk.ids) - min(talk.cached, len(talk.ids) - 1))
        return read(model, cache, dialogues)

    monkeypatch.setattr(sampling, "read", counted)
    reply = server.say("what is red 1?", max_tokens=8).reply
    lengths.clear()
    prompt = server.say("what is red 1?", reply, "ok", max_tokens=8).json["usage"]["prompt_tokens"]
    assert lengths[0] < prompt / 2 and set(lengths[1:]) <= {1}


def test_the_openai_client(server, client):
    """A program that talks to OpenAI cannot talk to this server."""
    (model,) = client.models.list().data
    arguments = {**request("what is red 1?", max_tokens=5), "model": model.id, "seed": 1}
    whole = client.chat.completions.create(**arguments)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**arguments, **options)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    assert last.usage == whole.usage and not last.choices


def test_why_a_reply_ended(server):
    """ "length" at max_tokens, "stop" where the model or a stop string ended it."""
    full = server.say("what is red 1?", max_tokens=20)
    cut = server.say("what is red 1?", max_tokens=2)
    assert cut.json["choices"][0]["finish_reason"] == "length"
    assert cut.json["usage"]["completion_tokens"] == 2 and full.reply.startswith(cut.reply)
    middle = full.reply[3:5]
    stopped = server.say("what is red 1?", max_tokens=20, stop=["never", middle])
    assert stopped.reply == full.reply[: full.reply.index(middle)]
    assert stopped.json["choices"][0]["finish_reason"] == "stop"


def test_a_model_that_ends_its_reply_has_stopped(serving, trained, monkeypatch):
    """The end of a turn, which is no text, was taken for a cut."""
    chat = load_chat(trained, device="cpu", dtype="float32")
    monkeypatch.setattr(sampling, "pick", lambda *_: next(tokens))
    word = chat.talk.tokenizer.encode("red")
    tokens = iter([*word, chat.talk.tokenizer.sep])
    answer = serving(chat).say("hi")
    assert answer.reply == "red" and answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.json["usage"]["completion_tokens"] == len(word)


def test_the_same_seed_the_same_reply(server):
    """A seed is ignored, or changes what requests without one get."""
    ask = ["what is red 1?"]
    replies = [server.say(*ask, temperature=2, seed=seed).reply for seed in (5, 5, -6)]
    assert replies[0] == replies[1] != replies[2]
    assert len({server.say(*ask, temperature=2).reply for _ in range(5)}) > 1


@pytest.mark.parametrize(
    "stops", [["b"], ["bc", "cb"], ["abcab"], ["aaaa", "ba"], ["cc", "abcabc", "c"], []]
)
def test_text_before_a_stop_string(stops):
    """A stop string that is cut into pieces is shown, or text before it is held back for ever."""
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("abc", k=draw.randrange(12)))
        found = [text.find(stop) for stop in stops if stop in text]
        stream = StopFilter(stops)
        shown = ""
        rest = text
        while rest and not stream.found:
            size = draw.randint(1, 3)
            shown += stream.push(rest[:size])
            rest = rest[size:]
            seen = text[: len(text) - len(rest)]
            assert seen.startswith(shown) or stream.found
        shown += stream.flush()
        # of two stop strings in one piece the first counts; in several, the one that is whole first
        assert stream.found == bool(found)
        if len(stops) == 1:
            assert shown == text[: found[0] if found else None]
        assert text.startswith(shown) and not any(stop in shown for stop in stops)


def test_line_breaks_are_what_they_were_in_training(server):
    """A text with line breaks, which the reader joins, is something that no model has read."""
    assert server.say(" what\nis\r\nred 1? ").reply == server.say("what is red 1?").reply
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "red 1?"}]
    assert server.say(parts).reply == server.say("what is red 1?").reply


# --- many clients, slow ones, and those that leave ------------------------------------------------


def test_sixteen_clients_at_once(serving, chat):
    """A reply is mixed with another, or a client waits for ever."""
    server = serving(chat, engine=Engine(waiting=8))
    asks = [f"what is {'red' if i % 2 else '白色'} {i}?" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.say, asks))
    served = [answer.status == 200 for answer in answers]
    assert sum(served) >= 9
    for ask, answer in zip(asks, answers, strict=True):
        if answer.status == 200:
            assert answer.reply == server.say(ask).reply
        else:
            assert answer.status == 429 and answer.headers["retry-after"] == "1" and answer.error


def test_one_works_one_waits_one_is_refused(serving, chat, gate):
    """More requests than the queue holds wait, or two are worked for at a time."""
    server = serving(chat, engine=Engine(waiting=1))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.say, "a", max_tokens=2)
        wait_for(lambda: gate.reads == 1, "the first request")
        second = pool.submit(server.say, "b", max_tokens=2)
        wait_for(lambda: server.engine.inside == 2, "the second request")
        refused = server.say("c")
        assert refused.status == 429 and "busy" in refused.error["message"]
        assert server.ask("GET", "/health").status == 200, "others are answered meanwhile"
        assert gate.reads == 1
        gate.let_through.release(100)
        assert first.result().reply and second.result().reply


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model_within_a_token(serving, chat, gate, stream):
    """The model goes on talking to nobody, as the servers of others do."""
    server = serving(chat)
    connection = server.connect()
    body = json.dumps(request("what is red 1?", stream=stream))
    connection.request("POST", COMPLETE, body, JSON)
    gate.let_through.release(3)
    wait_for(lambda: gate.reads == 4, "the fourth token")
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    wait_for(lambda: server.engine.inside == 0, "the server to notice")
    gate.let_through.release(100)
    assert server.say("what is blue 2?", max_tokens=7).reply == 7 * "a"
    assert gate.reads == 4 + 7


def test_a_client_that_leaves_the_queue(serving, chat, gate):
    """The place of a request that nobody waits for any more stays taken."""
    server = serving(chat)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.say, "a", max_tokens=2)
        wait_for(lambda: gate.reads == 1, "the first request")
        connection = server.connect()
        connection.request("POST", COMPLETE, json.dumps(request("b")), JSON)
        wait_for(lambda: server.engine.inside == 2, "the second request")
        connection.close()
        wait_for(lambda: server.engine.inside == 1, "the server to notice")
        gate.let_through.release(2)
        assert first.result().status == 200
    assert gate.reads == 2, "the second one was worked for"


def test_the_time_limit(serving, chat):
    """A reply takes the model for longer than the limit."""
    server = serving(chat, engine=Engine(seconds=1e-9))
    answer = server.say("what is red 1?")
    assert answer.json["usage"]["completion_tokens"] == 1
    assert answer.json["choices"][0]["finish_reason"] == "length"


def test_a_body_that_does_not_come(server, monkeypatch):
    """Clients that send a byte a minute take all connections."""
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    connection = server.connect()
    connection.putrequest("POST", COMPLETE)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert response.status == 408 and "0.3 seconds" in response.read().decode()


@pytest.mark.parametrize("is_first", [True, False])
def test_headers_that_do_not_come(server, monkeypatch, is_first):
    """The same by headers, of the first request on a connection or of a later one."""
    monkeypatch.setattr(listen, "HEADER_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        if not is_first:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b'"ok"' not in answer:  # the head and the body may come one by one
                piece = client.recv(10_000)
                assert piece, answer
                answer += piece
        client.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert client.recv(100) == b"", "closed"


def test_a_client_that_does_not_take_what_it_is_sent(monkeypatch):
    """A client that stops reading keeps the model for itself."""
    monkeypatch.setattr(guard, "SEND_SECONDS", 0.05)
    ended = []

    async def talkative(scope, receive, send):
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append(True)

    async def never(*_):
        await asyncio.Event().wait()

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    app = guard.Guard(talkative, ["localhost"], "")
    asyncio.run(asyncio.wait_for(app(scope, never, never), 20))
    assert ended


# --- what is refused ------------------------------------------------------------------------------

ASK = json.dumps(request("hi", max_tokens=1)).encode()


@pytest.mark.parametrize(
    "headers, status, says",
    [
        ({"Host": "evil.example"}, 400, "names="),
        ({"Host": "localhost.evil.example"}, 400, "names="),
        ({"Host": "[::1"}, 400, "names="),
        ({"Host": ""}, 400, "names="),
        ({"Origin": "http://evil.example"}, 403, "other sites"),
        ({"Origin": "null"}, 403, "other sites"),
        ({"Origin": "http://localhost:1"}, 403, "other sites"),
        ({"Content-Type": "text/plain"}, 415, "application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        ({"Content-Type": ""}, 415, "application/json"),
        ({"Content-Encoding": "gzip"}, 415, "plain JSON"),
    ],
)
def test_requests_of_strangers(server, headers, status, says):
    """A page of another site uses this server through the browser of its user."""
    answer = server.ask("POST", COMPLETE, ASK, {**JSON, **headers})
    assert answer.status == status and says in answer.error["message"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_requests_of_the_own_page(server, host):
    """The own page is refused, by one of the names of this computer."""
    own = f"{host}:{server.port}"
    headers = {**JSON, "Host": own, "Origin": f"http://{own.lower()}"}
    assert server.ask("POST", COMPLETE, ASK, headers).status == 200


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large(server, is_announced):
    """A body fills the memory: one with its length, or one of chunks without an end."""
    connection = server.connect()
    connection.putrequest("POST", COMPLETE)
    connection.putheader("Content-Type", "application/json")
    if is_announced:
        connection.putheader("Content-Length", str(guard.MAX_BODY + 1))
        connection.endheaders()
    else:
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        for _ in range(17):
            connection.send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    response = connection.getresponse()
    assert response.status == 413 and "1048576 bytes" in response.read().decode()
    assert server.say(" " * 1000 + "hi", max_tokens=1).status == 200


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "body, param, says",
    [
        (b"", "body", "required"),
        (b"{", None, "no valid JSON"),
        (b"\xff\xfe\xff", None, ""),
        (b"[" * 100_000, None, ""),
        (b'{"messages": ' + b"9" * 10_000 + b"}", None, ""),
        ([], "body", "valid dictionary"),
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": HI * 2001}, "messages", "at most 2000 items"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages.0.content", "no text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [*HI, *HI]}, "messages.1.role", "take turns"),
        ({"messages": [*HI, {"role": "assistant", "content": ""}]}, "messages", "of the user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "of the user"),
        (
            {"messages": [{"role": "system", "content": "x " * 99}, *HI]},
            "messages",
            "system prompt",
        ),
        ({"messages": HI, "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"messages": HI, "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"messages": HI, "temperature": 1e-9}, "temperature", "at least 0.001"),
        ({"messages": HI, "temperature": float("nan")}, "temperature", "finite"),
        ({"messages": HI, "temperature": "1"}, "temperature", "valid number"),
        ({"messages": HI, "temperature": True}, "temperature", "valid number"),
        ({"messages": HI, "top_p": 0}, "top_p", "greater than 0"),
        ({"messages": HI, "top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"messages": HI, "repetition_penalty": 0}, "repetition_penalty", "0.01"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": HI, "max_tokens": 10**30}, "max_tokens", "1000000"),
        ({"messages": HI, "max_tokens": 1.5}, "max_tokens", "integer"),
        ({"messages": HI, "seed": 2**63}, "seed", "less than or equal"),
        ({"messages": HI, "stop": ""}, "stop", "at least 1 character"),
        ({"messages": HI, "stop": ["x"] * 5}, "stop", ""),
        ({"messages": HI, "n": 2}, "n", "less than or equal to 1"),
        ({"messages": HI, "stream": "yes"}, "stream", "boolean"),
        ({"messages": HI, "tools": []}, "tools", "no such setting"),
        ({"messages": HI, "\ud800": 1}, "body", "string"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value,
)
def test_bodies_out_of_bounds(server, body, param, says):
    """A number or a length without bounds reaches the model, or a mistake is not named."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    answer = server.ask("POST", COMPLETE, body, JSON)
    assert answer.status == 400, answer.text
    assert says in answer.error["message"] and answer.error["type"] == "invalid_request_error"
    if param is not None:
        assert answer.error["param"].startswith(param)


def test_other_models_paths_and_methods(server):
    """A program that asks for gpt-4 believes to have been answered by it."""
    other = server.say("hi", model="gpt-4")
    assert other.status == 404 and other.error["code"] == "model_not_found"
    assert server.say("hi", model="r", max_tokens=1).status == 200
    for method, path, status in [("GET", "/docs", 404), ("GET", COMPLETE, 405), ("PUT", "/", 405)]:
        answer = server.ask(method, path)
        assert answer.status == status and f"POST {COMPLETE}" in answer.error["message"]


def test_an_error_of_ours(serving, trained, monkeypatch, capfd):
    """A client is shown a traceback, or the model stays taken."""
    chat = load_chat(trained, device="cpu", dtype="float32")
    server = serving(chat)

    def broken(*_):
        raise RuntimeError("secret path")

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "read", broken)
        answers = [server.say("hi"), server.say("hi", stream=True)]
    for answer in answers:
        assert answer.status == 500 and "secret" not in answer.text
        assert answer.error["type"] == "server_error"
    assert "secret path" in capfd.readouterr().err
    assert server.say("hi", max_tokens=1).status == 200


def test_a_key(serving, chat):
    """A server that others can reach answers who does not know the key."""
    server = serving(chat, key="sesame-42")
    for given in (None, "sesame-42", "Bearer ", "Bearer sesame-4", "Bearer sesame-42 ", "Bearer é"):
        extra = {} if given is None else {"Authorization": given.encode("latin-1")}
        answer = server.ask("POST", COMPLETE, ASK, {**JSON, **extra})
        known = given == "Bearer sesame-42 "  # spaces around a header are none of it
        assert answer.status == (200 if known else 401), given
        assert "sesame" not in answer.text
    assert server.ask("GET", "/v1/models").error["code"] == "invalid_api_key"
    assert server.ask("GET", "/v1/models", headers={"Authorization": "Bearer sesame-42"}).json
    for open_path in ("/", "/health"):
        assert server.ask("GET", open_path).status == 200, "they hold no secret"


# --- a thousand of them ---------------------------------------------------------------------------


class Hostile:
    """Requests that must be refused, each of a kind and with the status of docs/serving.md."""

    def __init__(self, server: Server, seed: int):
        self.server = server
        self.draw = random.Random(seed)

    def ask(self) -> tuple[int, Answer]:
        """Send one. The status that it must get, and its answer."""
        kinds = [
            self.of_another_host,
            self.of_another_page,
            self.of_another_type,
            self.too_large,
            self.out_of_bounds,
            self.cut_off,
            self.of_bytes,
            self.elsewhere,
            self.slow,
        ]
        return self.draw.choice(kinds)()

    def word(self) -> str:
        return "".join(self.draw.choices("abcxyz", k=8))

    def post(self, body: object = ASK, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.server.ask("POST", COMPLETE, body, JSON | named)

    def of_another_host(self) -> tuple[int, Answer]:
        name = self.draw.choice([self.word(), "127.0.0.1.", "[::", "localhost.evil.example", "@"])
        return 400, self.post(Host=name)

    def of_another_page(self) -> tuple[int, Answer]:
        origin = self.draw.choice(["null", "http://localhost", f"https://{self.word()}.example"])
        return 403, self.post(Origin=origin)

    def of_another_type(self) -> tuple[int, Answer]:
        kind = self.draw.choice(["text/plain", "multipart/form-data", "application/jsonp", ""])
        return 415, self.post(Content_Type=kind)

    def too_large(self) -> tuple[int, Answer]:
        size = guard.MAX_BODY + self.draw.randrange(1, 10**12)
        return 413, self.post(Content_Length=str(size))

    def out_of_bounds(self) -> tuple[int, Answer]:
        numbers = {
            "temperature": [-1, 2.01, 1e-12, 1e308, float("nan"), float("inf"), "1", [], True],
            "top_p": [0, 1.01, -1, {}],
            "top_k": [-1, 10**9, 0.5],
            "max_tokens": [0, -1, 10**18, 1e3 + 0.5, "9"],
            "seed": [2**63, -(2**63) - 1, 1.5],
            "stop": ["", [""], ["x"] * 5, "x" * 101, 5],
            "messages": [[], None, HI * 2, HI * 2001, [5], [{"role": self.word(), "content": ""}]],
            "stream": ["yes", 1],
            self.word(): [0],
        }
        name = self.draw.choice([*numbers])
        return 400, self.post({"messages": HI, name: self.draw.choice(numbers[name])})

    def cut_off(self) -> tuple[int, Answer]:
        return 400, self.post(ASK[: self.draw.randrange(len(ASK))])

    def of_bytes(self) -> tuple[int, Answer]:
        kinds = [self.draw.randbytes(self.draw.randrange(1, 2000)), b"[" * 50_000, b"9" * 50_000]
        return 400, self.post(self.draw.choice(kinds))

    def elsewhere(self) -> tuple[int, Answer]:
        path = self.draw.choice([f"/{self.word()}", "/..%2f..%2fetc/passwd", "/v1/classify"])
        return 404, self.server.ask("GET", path)

    def slow(self) -> tuple[int, Answer]:
        """The body stops in the middle."""
        connection = self.server.connect()
        connection.putrequest("POST", COMPLETE)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(ASK)))
        connection.endheaders(ASK[: self.draw.randrange(len(ASK) - 1)])
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.getheaders()), response.read().decode())
        connection.close()
        return 408, answer


def in_use() -> tuple[int, int]:
    """This process's memory in bytes, and how many files and sockets it has open."""
    _, resident, *_ = Path("/proc/self/statm").read_text().split()
    return int(resident) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
def test_a_thousand_hostile_requests(serving, chat, monkeypatch, capfd):
    """Among a thousand one reaches the model, breaks the server, or leaves something behind."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("/proc, which tells what a process uses, is Linux's")
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(sampling, "read", lambda *_: pytest.fail("the model was asked"))
    server = serving(chat)
    seen = set()

    def ask(seed: int) -> None:
        due, answer = Hostile(server, seed).ask()
        assert answer.status == due and answer.error["message"], (seed, due, answer)
        assert "Traceback" not in answer.text and str(Path.cwd()) not in answer.text
        seen.add(due)

    state = server.uvicorn.server_state
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(300)))  # until all that is made once is made
        wait_for(lambda: not state.connections and not state.tasks, "the first 300 to be over")
        memory_before, open_before = in_use()
        list(pool.map(ask, range(300, 1300)))
        wait_for(lambda: not state.connections and not state.tasks, "the thousand to be over")
    memory, still_open = in_use()
    grown = memory - memory_before
    assert grown < 8e6 and still_open <= open_before, (grown, open_before, still_open)
    assert server.engine.inside == 0 and seen == {400, 403, 404, 408, 413, 415}
    assert capfd.readouterr().err == ""
    monkeypatch.undo()
    assert server.say("hi", max_tokens=1).status == 200


# --- a classifier ---------------------------------------------------------------------------------


def test_a_classifier(serving, fit):
    """The labels are others than those of load_classifier, or a chat is offered."""
    classifier = load_classifier(fit(), "cpu", "float32")
    server = serving(classifier)
    texts = [f"the room was {word} {i}" for i, word in enumerate(["lovely", "awful"] * 20)]
    answer = server.ask("POST", "/v1/classify", {"input": texts}).json
    assert [found["index"] for found in answer["data"]] == list(range(40))
    for found, expected in zip(answer["data"], classifier(texts), strict=True):
        assert found["label"] == expected.label
        assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert found["probability"] == max(found["probabilities"].values())
    (one,) = server.ask("POST", "/v1/classify", {"input": texts[0]}).json["data"]
    assert one["label"] == answer["data"][0]["label"]
    for body, param in [
        ({"input": []}, "input"),
        ({"input": ["a", " "]}, "input.1"),
        ({"input": ["a"] * 1001}, "input"),
        ({"input": [1]}, "input"),
        ({"input": "a", "top_k": 1}, "top_k"),
    ]:
        refused = server.ask("POST", "/v1/classify", body)
        assert refused.status == 400 and refused.error["param"].startswith(param)
    assert "POST /v1/classify" in server.say("hi").error["message"]
    assert server.ask("GET", "/").status == 404

    server.engine.seconds = 0
    late = server.ask("POST", "/v1/classify", {"input": texts})
    assert late.status == 503 and "fewer texts" in late.error["message"]


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture
def page():
    """A tab of a headless Chromium; what it writes to its console must be nothing."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    said = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 640})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        yield page
        browser.close()
    refused = "Failed to load resource: the server responded with a status of 40"  # the browser's
    assert [text for text in said if not text.startswith(refused)] == []


def test_the_page(serving, chat, gate, page):
    """The page loses a turn, runs markup, sends what an input method composes, or cannot stop."""
    from playwright.sync_api import expect

    server = serving(chat)
    text = page.locator("#text")
    send = page.locator("#send")
    turns = page.locator(".turn")
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page).to_have_title("r")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("5")
    page.get_by_role("button", name="Done").click()

    gate.let_through.release(5)
    markup = "<b>红色</b> <img src=x onerror=alert(1)>"
    text.fill(markup)
    text.press("Enter")
    expect(turns).to_have_text([markup, "aaaaa"])
    expect(send).to_have_text("Send")
    assert page.locator("#log b, #log img").count() == 0

    devices = page.context.new_cdp_session(page)
    composing = {"text": "你好", "selectionStart": 2, "selectionEnd": 2}
    devices.send("Input.imeSetComposition", composing)
    text.press("Enter")
    text.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})  # as Safari has it
    expect(turns).to_have_count(2)
    text.fill("第二次")
    text.press("Shift+Enter")
    expect(turns).to_have_count(2)

    text.press("Enter")
    expect(send).to_have_text("Stop")
    gate.let_through.release(2)
    expect(turns.last).to_have_text("aa")
    send.click()
    expect(page.locator(".note").last).to_have_text("stopped")
    gate.let_through.release(1)
    wait_for(lambda: server.engine.inside == 0, "the model")
    assert gate.reads == 5 + 3

    gate.let_through.release(5)
    text.fill("third")
    send.click()
    expect(turns).to_have_text([markup, "aaaaa", "第二次", "aa", "third", "aaaaa"])
    page.get_by_role("button", name="New chat").click()
    expect(turns).to_have_count(0)


def test_a_refusal_on_the_page(serving, chat, page):
    """A message is lost when the server refuses it."""
    from playwright.sync_api import expect

    server = serving(chat, key="sesame")
    page.goto(f"http://127.0.0.1:{server.port}/")
    dialog = page.locator("#settings")
    expect(dialog).to_be_visible()
    page.get_by_label("Key").fill("sesame")
    page.get_by_label("System prompt").fill("x " * 99)
    page.get_by_role("button", name="Done").click()
    page.locator("#text").fill("hi")
    page.locator("#text").press("Enter")
    expect(page.locator(".wrong")).to_contain_text("system prompt")
    expect(page.locator("#text")).to_have_value("hi")
    expect(page.locator(".turn")).to_have_count(0)


def test_the_policy_of_the_page(server):
    """A script of somebody else could run in the page."""
    answer = server.ask("GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "//"):
        code = re.sub(r"^\s*//.*|  // .*", "", answer.text, flags=re.M)
        assert forbidden not in code
    assert not re.search(r'\son\w+="', answer.text), "a handler in the markup"


# --- the command ----------------------------------------------------------------------------------


def test_the_command(start, trained):
    """The command says another address than it listens at, or Ctrl-C leaves a traceback."""
    process = start("scripts.serve", [trained, "port=0", "device=cpu", "dtype=float32"])
    out, err = process.files
    wait_for(lambda: out.exists() and "Ctrl-C" in out.read_text(encoding="utf-8"), "its address")
    port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", out.read_text(encoding="utf-8"))[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", COMPLETE, ASK, JSON)
    assert connection.getresponse().status == 200
    process.kill(signal.SIGINT)
    assert (process.wait().status, err.read_text(encoding="utf-8")) == (130, "")


@pytest.mark.parametrize(
    "words, says",
    [
        (["host=0.0.0.0"], "host=0.0.0.0 lets other computers in: set a key"),
        (["host=192.168.1.5"], "set a key"),
        (["host=example.org"], "set a key"),
        (["key_env=NOT_SET_ANYWHERE"], "an environment variable that holds the key"),
        (["port=70000"], "port must be int >= 0 and <= 65535"),
        (["sample.temperature=-1"], "temperature must be"),
    ],
)
def test_mistakes_of_the_command(mistake_of, trained, words, says):
    """A server that anybody can use is started, or a mistake ends in a traceback."""
    message = mistake_of(serve.main, [trained, *words])
    assert says in message and "NOT_SET_ANYWHERE" not in message


def test_more_mistakes_of_the_command(mistake_of, trained, tmp_path, monkeypatch):
    """A mistake ends in a traceback: no model, a port that is taken, a key with a line break."""
    assert "which model?" in mistake_of(serve.main, [])
    assert "there is no checkpoint" in mistake_of(serve.main, [tmp_path / "none", "port=0"])
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in mistake_of(serve.main, [trained, f"port={port}"])
    monkeypatch.setenv("OUR_KEY", "se same")
    message = mistake_of(serve.main, [trained, "key_env=OUR_KEY"])
    assert "ASCII" in message and "se same" not in message


def test_without_the_extra(mistake_of, trained, monkeypatch):
    """Who has not installed the extra sees a traceback."""
    for name in list(sys.modules):
        if name.startswith("smallgpt.server"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    message = mistake_of(serve.main, [trained])
    assert "fastapi" in message and "pip install -r requirements-serve.txt" in message
