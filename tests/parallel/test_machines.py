"""Two machines: network namespaces of this one, each with its own address and name.

As on Debian, the machine's own name means 127.0.1.1 there, so a program that announces "the address
of my name" to the others cannot be reached by them.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import ENV, Started, command, free_port, losses, sentence, steps, wait_for

pytestmark = pytest.mark.slow

LAYOUTS = {
    "ddp": ("train", []),
    "fsdp": ("train_fsdp", ["mesh.shard=4"]),
    "pp_fsdp": ("train_fsdp", ["mesh.pp=2", "mesh.shard=2"]),
}


class Machine(NamedTuple):
    """A network namespace, the one end of a cable."""

    namespace: str
    name: str
    address: str
    card: str

    def link(self, state: str) -> None:
        """state: up or down."""
        ip("netns", "exec", self.namespace, "ip", "link", "set", self.card, state)

    def popen(self, argv: list[str]) -> subprocess.Popen:
        """Start a command there."""
        shell = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *shell, *argv],
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    """Two machines, joined by a cable."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    mine = os.getpid()
    both = [
        Machine(f"sg{mine}{end}", f"node{end}", f"10.77.0.{number}", f"v{mine}{end}")
        for number, end in enumerate("ab", 1)
    ]
    try:
        try:
            connect(*both)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode()}")
        yield both
    finally:
        for machine in both:  # the cable goes with them
            subprocess.run(["ip", "netns", "del", machine.namespace], capture_output=True)
            shutil.rmtree(f"/etc/netns/{machine.namespace}", ignore_errors=True)


def connect(a: Machine, b: Machine) -> None:
    """Make both namespaces, the cable, and the names."""
    for machine in (a, b):
        ip("netns", "add", machine.namespace)
    ip("link", "add", a.card, "type", "veth", "peer", "name", b.card)
    for machine, other in ((a, b), (b, a)):
        inside = ("netns", "exec", machine.namespace, "ip")
        ip("link", "set", machine.card, "netns", machine.namespace)
        ip(*inside, "addr", "add", f"{machine.address}/24", "dev", machine.card)
        ip(*inside, "link", "set", "lo", "up")
        machine.link("up")
        folder = Path("/etc/netns", machine.namespace)  # ip puts its files over those of /etc
        folder.mkdir(parents=True)
        names = (
            "127.0.0.1 localhost",
            f"127.0.1.1 {machine.name}",
            f"{other.address} {other.name}",
        )
        (folder / "hosts").write_text("\n".join(names) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("machines")


@pytest.fixture(scope="module")
def small(tiny, out):
    """small(run, key=value...) -> arguments of a short run that any layout can cut."""

    def args(run: str, **changes: object) -> list[str]:
        few = {"model__n_layer": 2, "model__n_head": 4, "max_steps": 5, "dtype": "float64"}
        return tiny(out, run=run, **(few | changes))

    return args


@pytest.fixture(scope="module")
def start_on(start, machines):
    """start_on(args, script) -> four ranks, two on each machine."""

    def start_on(argv: list[str], script: str = "train") -> list[Started]:
        env = {
            "WORLD_SIZE": "4",
            "MASTER_ADDR": machines[0].address,
            "MASTER_PORT": str(free_port()),
        }
        processes = []
        for rank in range(4):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
            where = machines[rank // 2].namespace
            processes.append(start(script, argv, env={**env, **mine}, namespace=where))
        return processes

    return start_on


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_machines_train_as_one(out, small, start_on, start_ranks, layout):
    """Regression: without GLOO_SOCKET_IFNAME each side told the other to connect to 127.0.0.1."""
    script, mesh = LAYOUTS[layout]
    local = start_ranks(4, [*small(f"{layout}-local"), *mesh], script=script)
    apart = start_on([*small(layout), *mesh], script)
    results = [process.wait() for process in [*local, *apart]]
    assert [r.status for r in results] == [0] * 8, [r.err[-1000:] for r in results]
    assert "network  gloo uses v" in results[4].out and "network" not in results[0].out
    for split in ("train", "val"):
        truth = losses(out / f"{layout}-local", split)
        assert losses(out / layout, split) == pytest.approx(truth, rel=1e-12, abs=0)
        assert truth


def test_the_commands_of_the_readme(out, small, machines):
    """As they are typed on two machines: with a number for each machine, and with the rendezvous
    of c10d at the name of one of them."""
    nodes = {}
    for way in ("static", "c10d"):
        port = free_port()
        for number, machine in enumerate(machines):
            where = [f"--node_rank={number}", f"--master_addr={machines[0].address}"]
            where.append(f"--master_port={port}")
            if way == "c10d":
                where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={machines[0].name}:{port}"]
            words = command(small(way), "--nnodes=2", "--nproc_per_node=1", *where)
            nodes[way, number] = machine.popen(words)
    for key, node in nodes.items():
        text, error = node.communicate(timeout=240)
        assert node.returncode == 0, (key, error[-2000:])
    assert losses(out / "static", "train") == losses(out / "c10d", "train")
    assert steps(out / "static") == [4, 5]


def test_a_cut_cable_ends_both_sides_and_the_run_goes_on_when_it_is_back(
    out, small, machines, start_on
):
    """Nothing comes over a dead link, not even the news that it is dead: both sides waited for half
    an hour."""
    args = small("cut", timeout=4, max_steps=5000, save_every=10, eval_every=5000)
    processes = start_on(args)
    wait_for((out / "cut" / "latest").exists, "a checkpoint")
    machines[1].link("down")
    results = [process.wait(40) for process in processes]
    machines[1].link("up")
    assert [r.status for r in results] == [1] * 4, [r.err[-1000:] for r in results]
    assert "no answer from processes 2, 3" in sentence(results[0])
    for result in results[2:]:
        assert "no answer from process 0" in sentence(result)
    saved = steps(out / "cut")[-1]
    for process in start_on([*args, f"max_steps={saved + 4}"]):
        result = process.wait()
        assert result.status == 0, result.err
    assert steps(out / "cut")[-1] == saved + 4
