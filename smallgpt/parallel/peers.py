"""The other processes of a run: who failed first, who does not answer any more.

    peers = meet(rank, size, timeout, facts)    # in roll_call.py
    ...                                         # torch's process group; training
    raise peers.explain(error)                  # what an error here was a consequence of
    peers.leave()                               # at a good end

A thread of each process waits for the alarm that a failing one gives, in the store where they have
met. So a process answers while its main thread computes, or hangs: it tells where.
"""

import json
import os
import select
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import DistError, Store

from smallgpt import console
from smallgpt.console import PeerError, UserError

POLL = 0.1  # seconds between looks at the store
GRACE = 5.0  # seconds in which a living process answers the alarm, on a busy machine, too
LAST = 30.0  # seconds after the alarm in which the main thread may end by itself
WAITING = "waits for others"


@dataclass(frozen=True)
class Peer:
    """A process of the run, as it answered the roll call."""

    rank: int
    host: str  # name of its machine
    address: str  # of its machine, on the way to MASTER_ADDR
    token: str  # of this start: a store may still hold the answers of an earlier one

    def __str__(self) -> str:
        return f"process {self.rank} on {self.host}"


def counted(ranks: list[int]) -> str:
    """[3, 4] -> "processes 3, 4"."""
    noun = "process" if len(ranks) == 1 else "processes"
    return f"{noun} {', '.join(map(str, ranks))}"


def by_machine(peers: list[Peer]) -> str:
    """ "processes 0, 1 on nodeA; process 2 on nodeB"."""
    ranks: dict[str, list[int]] = {}
    for peer in peers:
        ranks.setdefault(peer.host, []).append(peer.rank)
    return "; ".join(f"{counted(numbers)} on {host}" for host, numbers in ranks.items())


@dataclass(frozen=True)
class Cause:
    """Why the processes of a run end, as one of them tells the others."""

    sentence: str
    mistake: bool = False  # of a user
    told: bool = False  # the process where it happened says so itself

    def error(self) -> Exception:
        """What to raise in the other processes."""
        return UserError(self.sentence) if self.mistake else PeerError(self.sentence, self.told)


class Peers:
    """The processes of a group that has met, of which this is one."""

    def __init__(self, store: Store, where: tuple[str, int], everyone: list[Peer], me: Peer):
        self.store = store
        self.everyone = everyone
        self.me = me
        self.gpu: torch.device | None = None  # for whose work the main thread may wait
        self.others = [peer for peer in everyone if peer != me]
        self.cause: Cause | None = None
        # idle: it ends when the store does, of which torch would print a page
        self.canary = socket.create_connection(where)
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self.watch, args=(store.clone(),), daemon=True)
        self.watcher.start()

    def has(self, store: Store, key: str) -> bool:
        """Does the store hold it? RuntimeError if the store has ended."""
        readable, _, _ = select.select([self.canary], [], [], 0)
        if readable:
            raise RuntimeError("the store has ended")
        return store.check([key])

    def watch(self, store: Store) -> None:
        """Wait for the alarm; tell where the main thread is; end the process if it stays there.

        In a thread of its own, with a connection of its own to the store."""
        main = threading.main_thread()
        alarmed = False
        with suppress(RuntimeError):
            while not self.has(store, "alarm"):
                if self.ended.wait(1):
                    return
            alarmed = True
            store.set(f"alive/{self.me.rank}", place_of(main, self.gpu))
            self.hear(store, LAST)
        if alarmed and not self.ended.wait(LAST):
            why = self.cause.sentence if self.cause else "another process has failed"
            console.report(f"{why}; this one was {place_of(main, self.gpu)}")
            os._exit(1)

    def hear(self, store: Store, seconds: float) -> None:
        """Wait until some process has told the cause; so many seconds at most."""
        end = time.monotonic() + seconds
        while not self.cause and time.monotonic() < end:
            if self.has(store, "cause"):
                self.cause = Cause(**json.loads(store.get("cause")))
                store.set(f"heard/{self.me.rank}", "")
            time.sleep(POLL)

    def leave(self) -> None:
        """Stop watching: the run has come to its end."""
        self.ended.set()
        self.watcher.join()

    def explain(self, error: Exception) -> Exception:
        """The error itself if the fault is here; else what it is a consequence of."""
        reason = network_error(error)

        def ask() -> None:
            with suppress(RuntimeError):  # the store has ended
                if reason:
                    self.find_cause(reason)
                else:
                    self.tell_error(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(8 * GRACE)  # where the network is cut, the store may block for ever
        self.ended.set()
        if not reason:
            return error
        if self.cause:
            return self.cause.error()
        return PeerError(f"{no_answer(self.everyone[:1])}{reason}")

    def tell_error(self, error: Exception) -> None:
        """This process failed by itself: tell the others, if it is the first."""
        mistake = console.explain(error)
        if mistake:
            cause = Cause(f"{self.me}: {mistake}", mistake=True)
        else:
            cause = Cause(f"{self.me} failed first: {type(error).__name__}: {error}", told=True)
        is_first = self.tell(cause, self.others)
        if not is_first and not mistake:
            time.sleep(GRACE)  # they mostly fail alike, and one traceback is enough

    def tell(self, cause: Cause, listeners: list[Peer]) -> bool:
        """Tell the cause, unless another process has told one; wait until the listeners know it,
        for the store may end with this process."""
        text = json.dumps(asdict(cause))
        is_first = self.store.compare_set("cause", "", text).decode() == text
        self.store.set("alarm", "")
        if not is_first:
            self.store.set(f"heard/{self.me.rank}", "")
            return False
        end = time.monotonic() + 3 * GRACE
        for peer in listeners:
            while not self.has(self.store, f"heard/{peer.rank}") and time.monotonic() < end:
                time.sleep(POLL)
        return True

    def find_cause(self, reason: str) -> None:
        """The connection to the others failed: who failed first, or is dead, or hangs?"""
        time.sleep(3 * POLL)  # if the store ends, too, that shows now
        if self.cause or self.has(self.store, "cause"):
            self.hear(self.store, GRACE)
            return
        self.store.set(f"failed/{self.me.rank}", "")
        self.store.set("alarm", "")
        self.hear(self.store, GRACE)
        if self.cause:
            return
        alive = [peer for peer in self.others if self.has(self.store, f"alive/{peer.rank}")]
        dead = [peer for peer in self.others if peer not in alive]
        hung = []
        for peer in alive:
            place = self.store.get(f"alive/{peer.rank}").decode()
            if place != WAITING and not self.has(self.store, f"failed/{peer.rank}"):
                hung.append(f"{peer} ({place})")
        if dead:
            sentence = no_answer(dead)
        elif hung:
            sentence = f"the others waited in vain for {', '.join(hung)}"
        else:
            sentence = "the network between the processes failed"
        self.tell(Cause(sentence + reason), alive)
        self.hear(self.store, GRACE)


def no_answer(peers: list[Peer]) -> str:
    return f"no answer from {by_machine(peers)}: killed (was memory full?), stopped, or cut off"


def place_of(thread: threading.Thread, gpu: torch.device | None = None) -> str:
    """Where a thread is, in words: waiting inside torch or for its GPU, or at a line.

    With NCCL a collective waits on the GPU. The line is then one of ours that wants a number."""
    if gpu and is_busy(gpu):
        return WAITING
    frame = sys._current_frames().get(thread.ident)
    if frame is None:
        return "at its end"
    place = traceback.extract_stack(frame)[-1]
    file = Path(place.filename)
    if file.is_relative_to(Path(torch.__file__).parent):
        return WAITING
    root = Path(__file__).parents[2]
    shown = file.relative_to(root) if file.is_relative_to(root) else file
    return f"at {shown}:{place.lineno} in {place.name}"


def is_busy(gpu: torch.device) -> bool:
    """Has the GPU something left to do?"""
    try:
        return not torch.cuda.default_stream(gpu).query()
    except RuntimeError:  # it has failed, which the main thread learns by itself
        return False


def network_error(error: BaseException | None) -> str:
    """The reason in brackets, if the error came from the connection to other processes; else ""."""
    while error is not None and not isinstance(error, UserError):
        text = str(error)
        if isinstance(error, DistError) or "gloo" in text or "NCCL" in text:
            first_line = text.partition("\n")[0]
            first_sentence = first_line.partition(". ")[0]
            reason = first_sentence.partition("] ")[2]  # behind gloo's source file and line
            return f" ({reason or first_sentence})"
        error = error.__cause__ or error.__context__
    return ""
