"""A model with float16 weights says what it said with float32 ones, within a thousandth."""

import copy

import pytest
import torch
import torch.nn as nn

from model import GPT, GPTConfig
from smallgpt.weights.precision import HalfLinear, halve_linear_layers

SIZES = dict(vocab_size=320, block_size=24, n_layer=2, n_head=2, n_embd=64)
FORMS = {
    "default": GPTConfig(**SIZES),
    "GPT-2": GPTConfig(
        **SIZES, pos="learned", norm="layernorm", mlp="gelu", qk_norm=False, bias=True
    ),
    "swiglu, untied": GPTConfig(**SIZES, mlp="swiglu", tie_weights=False),
}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
@torch.inference_mode()
def test_scores_are_those_of_float32_weights_within_a_thousandth(config):
    """Read in pieces of 9, 1, 4 and 1 tokens, as a conversation does: one row and several."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    for p in model.parameters():
        p.add_(torch.randn(p.shape), alpha=0.1)
    halved = copy.deepcopy(model)
    halve_linear_layers(halved)
    tokens = torch.randint(config.vocab_size, (1, 15))
    expected = model(tokens)

    cache = halved.new_cache()
    start = 0
    states = []
    for piece in tokens.split([9, 1, 4, 1], dim=1):
        states.append(halved.trunk(piece, cache=cache, start=start))
        start += piece.size(1)
    scores = halved.lm_head(torch.cat(states, dim=1))
    assert scores.dtype == torch.float32
    assert 0 < (scores - expected).norm() < 2e-3 * expected.norm()


def test_every_linear_layer_takes_half_the_bytes_and_nothing_else_changes():
    """The embedding stays float32, also where the LM head is the same matrix."""
    model = GPT(FORMS["default"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    halve_linear_layers(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    halves = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    assert len(halves) == 6 * 2 + 1  # q, k, v, proj, fc, proj of a block, and the head
    for name, p in model.named_parameters():
        if name not in halves:
            assert torch.equal(p, before[name])
    assert torch.allclose(model.lm_head.weight.float(), before["wte.weight"], 1e-3, 1e-7)


@pytest.mark.parametrize("rows", [1, 3])
def test_inputs_beyond_float16_do_not_overflow(rows):
    """A squared ReLU can give a million; float16 ends at 65,504."""
    linear = nn.Linear(64, 8)
    x = torch.rand(rows, 64) * 1e6
    expected = linear(x)
    assert torch.allclose(HalfLinear(linear)(x), expected, rtol=1e-2, atol=1e3)
