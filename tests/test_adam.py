"""AdamW is torch's to the last bit."""

import torch

from smallgpt.adam import AdamW


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
