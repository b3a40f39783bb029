"""The roll call of a run: are all processes there, started alike, and how do they reach each other?

    peers = meet(rank, size, timeout, facts)    # UserError names who is missing, or what differs
    choose_interface(peers.me, peers.everyone)  # the network interface that leads to the others

They meet in the store at MASTER_ADDR:MASTER_PORT, where torch's processes meet as well.
"""

import ipaddress
import json
import os
import socket
import struct
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from smallgpt.console import UserError
from smallgpt.parallel.peers import GRACE, POLL, Peer, Peers, by_machine, counted

SIOCGIFADDR = 0x8915  # Linux: give the IPv4 address of a network interface


def meet(rank: int, size: int, timeout: int, facts: dict) -> Peers:
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
