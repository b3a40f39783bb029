"""A script whose process `rank` misbehaves in the middle of its collectives.

start_ranks(3, ["rank=1", "how=raise"], script="misbehaving")
"""

import os
import signal
import sys
import time

import torch.distributed

from smallgpt.console import UserError
from smallgpt.parallel import peers
from smallgpt.parallel.world import start


def misbehave(how: str) -> None:
    if how == "raise":
        raise ZeroDivisionError("a bug of this process only")
    if how == "mistake":
        raise UserError("its disk is full; make room")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hang":
        time.sleep(300)


def main() -> int:
    words = dict(word.split("=") for word in sys.argv[1:])
    peers.LAST = 5  # seconds
    with start("cpu", int(words["timeout"])) as world:
        group = torch.distributed.new_group()  # as a mesh makes them
        for step in range(4):
            if step == 2 and world.rank == int(words["rank"]):
                misbehave(words["how"])
            torch.distributed.all_reduce(torch.ones(1), group=group)
    return 0
