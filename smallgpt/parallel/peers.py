"""The other processes of a run: are all there, who failed first, who does not answer any more.

All of it goes through the store at MASTER_ADDR:MASTER_PORT, where torch's processes meet:

    peers = meet(rank, size, timeout, facts)    # a roll call; UserError names who is missing
    choose_interface(peers.me, peers.everyone)  # the network interface that leads to the others
    ...                                         # torch's process group; training
    raise peers.explain(error)                  # what an error here was a consequence of
    peers.leave()                               # at a good end

A thread of each process waits for the alarm that a failing one gives. So a process answers while
its main thread computes, or hangs: it tells where.
"""

import ipaddress
import json
import os
import select
import socket
import struct
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from smallgpt import console
from smallgpt.console import PeerError, UserError

POLL = 0.1  # seconds between looks at the store
GRACE = 5.0  # seconds in which a living process answers the alarm, on a busy machine, too
LAST = 30.0  # seconds after the alarm in which the main thread may end by itself
WAITING = "waits for others"
SIOCGIFADDR = 0x8915  # Linux: give the IPv4 address of a network interface


@dataclass(frozen=True)
class Peer:
    """A process of the run, as it answered the roll call."""

    rank: int
    host: str  # name of its machine
    address: str  # of its machine, on the way to MASTER_ADDR
    token: str  # of this start: a store may still hold the answers of an earlier one

    def __str__(self) -> str:
        return f"process {self.rank} on {self.host}"


# --- the roll call --------------------------------------------------------------------------------


def meet(rank: int, size: int, timeout: int, facts: dict) -> "Peers":
    """Wait until all processes are there. UserError after `timeout` seconds: it names who is
    missing; or at once: which of the facts is not alike in all processes."""
    deadline = time.monotonic() + timeout
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = source_address(where)
    store = PrefixStore("smallgpt", open_store(where, rank, timeout, deadline))
    me = Peer(rank, socket.gethostname(), address, uuid.uuid4().hex)
    try:
        if rank == 0:
            roster = call_the_roll(store, me, size, facts, deadline)
        else:
            roster = answer_the_roll(store, me, facts, deadline)
    except DistError as error:
        reason = "who listens there has ended: look at its messages"
        raise UserError(why_not_met(where, reason)) from error
    everyone = [Peer(**answer) for answer in roster["peers"]]
    if len(everyone) < size:
        missing = sorted({*range(size)} - {peer.rank for peer in everyone})
        raise UserError(
            f"{counted(missing)} of {size} did not answer within timeout={timeout} seconds; "
            f"these did: {by_machine(everyone)}. Look at the messages of the others: each must "
            f"reach {where[0]}:{where[1]} (torchrun --master_addr --master_port)"
        )
    if roster["difference"]:
        raise UserError(f"the processes were started differently: {roster['difference']}")
    return Peers(PrefixStore(everyone[0].token, store), where, everyone, me)


def source_address(where: tuple[str, int]) -> str:
    """This machine's address on the way to another one. The kernel is asked, nothing is sent."""
    host, port = where
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(why_not_met(where, error.strerror)) from error


def open_store(where: tuple[str, int], rank: int, timeout: int, deadline: float) -> Store:
    """The store of torchrun's agent; or, without an agent, of rank 0."""
    holder = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not holder:
        wait_for_port(where, deadline)
    try:
        return TCPStore(
            *where,
            is_master=holder,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        _, _, reason = str(error).rpartition("message: ")  # of the socket, where it is one's
        first_line = reason.partition("\n")[0]
        raise UserError(why_not_met(where, first_line.partition(". ")[0].rstrip("."))) from error


def wait_for_port(where: tuple[str, int], deadline: float) -> None:
    """Wait until somebody listens there: torch would print a page for each time it tries."""
    while True:
        left = max(1.0, deadline - time.monotonic())
        try:
            socket.create_connection(where, timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error)
                raise UserError(why_not_met(where, reason)) from error
        time.sleep(POLL)


def why_not_met(where: tuple[str, int], reason: str) -> str:
    """What prevents the processes from meeting, in one sentence."""
    found = ", ".join(f"{name} {address}" for name, address in interfaces().items())
    here = f"; the network interfaces here ({socket.gethostname()}) are {found}" if found else ""
    return (
        f"the processes cannot meet at {where[0]}:{where[1]} ({reason}): name the machine of rank "
        "0 in MASTER_ADDR (torchrun --master_addr) and a free port of it, open to the others, in "
        f"MASTER_PORT (torchrun --master_port){here}"
    )


def call_the_roll(store: Store, me: Peer, size: int, facts: dict, deadline: float) -> dict:
    """Rank 0's part: who is there, and the first difference between them."""
    store.set("call", me.token)
    keys = [f"{me.token}/{rank}" for rank in range(1, size)]
    while keys and not store.check(keys) and time.monotonic() < deadline:
        time.sleep(POLL)
    here = [key for key in keys if store.check([key])]
    peers = [asdict(me)]
    difference = ""
    for key in here:
        answer = json.loads(store.get(key))
        peers.append(answer["peer"])
        difference = difference or difference_of(me, facts, **answer)
    roster = {"peers": peers, "difference": difference}
    store.set(f"{me.token}/roster", json.dumps(roster))
    end = time.monotonic() + 3 * GRACE
    has_read = [f"{key}/read" for key in here]  # the store may end with this process
    while has_read and not store.check(has_read) and time.monotonic() < end:
        time.sleep(POLL)
    return roster


def difference_of(me: Peer, mine: dict, peer: dict, facts: dict) -> str:
    """The first fact of another process that is not as mine, in words; "" if all are."""
    for name, value in mine.items():
        if facts.get(name) != value:
            return f"{name} is {value} in {me} and {facts.get(name)} in {Peer(**peer)}"
    return ""


def answer_the_roll(store: Store, me: Peer, facts: dict, deadline: float) -> dict:
    """The part of the others: the roster. At first they may see the call of an earlier start, whose
    roster does not hold them."""
    answer = json.dumps({"peer": asdict(me), "facts": facts})
    call = ""
    while time.monotonic() < deadline + GRACE:
        time.sleep(POLL)
        if not store.check(["call"]):
            continue
        latest = store.get("call").decode()
        if call != latest:
            call = latest
            store.set(f"{call}/{me.rank}", answer)
        if store.check([f"{call}/roster"]):
            roster = json.loads(store.get(f"{call}/roster"))
            if asdict(me) in roster["peers"]:
                store.set(f"{call}/{me.rank}/read", "")
                return roster
    raise UserError(
        f"process 0 did not answer, though {os.environ['MASTER_ADDR']} does: look at its messages"
    )


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


# --- the network ----------------------------------------------------------------------------------


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address of this machine's network interfaces; empty where it cannot be known."""
    if sys.platform != "linux":
        return {}
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def choose_interface(me: Peer, everyone: list[Peer]) -> str:
    """On several machines, tell gloo which network interface leads to the others, unless the user
    has; returns what was done, in words.

    By itself gloo takes the address that the machine's own name has, which is often 127.0.1.1."""
    addresses = {peer.address for peer in everyone}
    if len(addresses) == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
        return ""
    mine = me.address
    if is_loopback(mine):  # MASTER_ADDR is this machine itself, by its name
        reachable = sorted(address for address in addresses if not is_loopback(address))
        if not reachable:
            return ""
        mine = source_address((reachable[0], 1))
    for name, address in interfaces().items():
        if address == mine:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return (
                f"gloo uses {name}, {mine}: the way to the others (GLOO_SOCKET_IFNAME is not set)"
            )
    return ""


# --- when something fails -------------------------------------------------------------------------


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
            store.set(f"alive/{self.me.rank}", place_of(main))
            self.hear(store, LAST)
        if alarmed and not self.ended.wait(LAST):
            why = self.cause.sentence if self.cause else "another process has failed"
            console.report(f"{why}; this one was {place_of(main)}")
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


def place_of(thread: threading.Thread) -> str:
    """Where a thread is, in words: waiting inside torch, or at a line."""
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
