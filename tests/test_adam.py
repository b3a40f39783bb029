"""AdamW is torch's to the last bit, and starts without the compiler."""

import subprocess
import sys

import torch

from helpers import ENV, ROOT
from smallgpt.adam import AdamW

START = """
import sys
import chat, train, scripts.classify
from smallgpt.optim import OptimSettings, make_optimizers, update
from smallgpt.parallel.strategy import Single

config = train.GPTConfig(vocab_size=8, block_size=8, n_layer=1, n_head=1, n_embd=8)
model = train.GPT(config)
world = train.World(0, 1, train.torch.device("cpu"))
strategy = Single(model, world, train.torch.float32)
optimizers = make_optimizers(strategy.names(), OptimSettings(name="muon"))
tokens = train.torch.zeros(1, 8, dtype=train.torch.long)
strategy.seed(0, 0)
batch = train.Batch((tokens, tokens, None), 8)
strategy.forward_backward([batch], lambda run, batch: run(*batch.inputs), 1)
update(optimizers, strategy.scaler, strategy.clip(optimizers, 1.0))
slow = ("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "sympy")
print(*(name for name in slow if name in sys.modules))
"""


def test_a_start_imports_nothing_that_a_first_step_does_not_need():
    """Each of these takes half a second, of two to three to the first step."""
    command = [sys.executable, "-c", START]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_update_is_that_of_torch():
    """What torch wraps around its methods is left out: some of it could have been the update."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(5, 7), (7,)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3, "fused": True}
    mine = AdamW(ours, **settings)
    reference = torch.optim.AdamW(theirs, **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in (mine, reference):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours, theirs, strict=True):
        assert a.equal(b) and a.grad is None
        assert mine.state[a].keys() == reference.state[b].keys()
        assert all(mine.state[a][key].equal(reference.state[b][key]) for key in mine.state[a])
