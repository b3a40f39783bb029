"""The model computes what it says, measured against references that share no code with it: Hugging
Face's GPT-2, Qwen3 and Llama with the same weights, naive loops, and PyTorch's own cross-entropy
and FLOP counter."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT,
    IGNORE,
    GPTClassifier,
    GPTConfig,
    LinearCrossEntropy,
    RMSNorm,
    cross_entropy_slice,
    most_classes,
    sample_classes,
)
from smallgpt.runs.metrics import flops_per_token

torch.set_num_threads(
    1
)  # tensors this small gain nothing from more, and wait for them on a busy machine

SMALL = GPTConfig(vocab_size=96, block_size=24, n_layer=2, n_head=4, n_embd=32)
GPT2 = replace(SMALL, pos="learned", norm="layernorm", mlp="gelu", bias=True, qk_norm=False)
QWEN3 = replace(SMALL, mlp="swiglu", n_kv_head=2, rope_base=5000.0)
# an epsilon so large that the default one would show
LLAMA = replace(QWEN3, qk_norm=False, tie_weights=False, norm_eps=0.01, mlp_width=80)
FORMS = {
    "default": SMALL,
    "gpt2": GPT2,
    "qwen3": QWEN3,
    "llama": LLAMA,
    "mixed": replace(SMALL, pos="learned", n_kv_head=1, bias=True, tie_weights=False),
}
every_form = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)


@torch.no_grad()
def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every tensor, norms and biases included, random values far from its initialisation: with
    weights of 0.02 and biases of 0 a wrong activation or a forgotten bias would hide below the
    tolerance."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(0.2 * noise if p.dim() == 2 else p + 0.3 * noise)
    return model.eval()


def tokens(config: GPTConfig, batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(
        config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def next_tokens(idx: Tensor) -> Tensor:
    """Targets of idx: the token to the right; the last position has none."""
    return F.pad(idx[:, 1:], (0, 1), value=IGNORE)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# --- Hugging Face, with the same weights ----------------------------------------------------------


def as_gpt2(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights, or their gradients) under GPT-2's names. Hugging Face's Conv1D holds
    the transpose of a Linear's matrix, and c_attn is q, k and v side by side."""
    theirs = {}
    for name, tensor in ours.items():
        if name.startswith("blocks."):
            _, i, part, leaf = name.split(".", 3)
            kind = name.rpartition(".")[2]  # weight or bias
            block = f"transformer.h.{i}."
            if leaf.startswith(("k.", "v.")):
                continue  # taken together with q
            if leaf.startswith("q."):
                q_k_v = [ours[f"blocks.{i}.attn.{m}.{kind}"] for m in "qkv"]
                theirs[f"{block}attn.c_attn.{kind}"] = torch.cat(q_k_v).t()
            elif part.startswith("norm"):
                theirs[f"{block}ln_{part[-1]}.{kind}"] = tensor
            else:  # attn.proj, mlp.fc, mlp.proj
                theirs[f"{block}{part}.c_{leaf.split('.')[0]}.{kind}"] = tensor.t()
        elif name.startswith("norm."):
            theirs["transformer.ln_f." + name.partition(".")[2]] = tensor
        elif name != "lm_head.weight":
            theirs["transformer." + name] = tensor  # wte, wpe
    return theirs


def as_llama(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names that Llama and Qwen3 share."""
    renamed = {
        "wte.": "model.embed_tokens.",
        "blocks.": "model.layers.",
        "attn.proj.": "self_attn.o_proj.",
        "attn.q_norm.": "self_attn.q_norm.",
        "attn.k_norm.": "self_attn.k_norm.",
        "attn.q.": "self_attn.q_proj.",
        "attn.k.": "self_attn.k_proj.",
        "attn.v.": "self_attn.v_proj.",
        "mlp.gate.": "mlp.gate_proj.",
        "mlp.fc.": "mlp.up_proj.",
        "mlp.proj.": "mlp.down_proj.",
        ".norm1.": ".input_layernorm.",
        ".norm2.": ".post_attention_layernorm.",
    }
    theirs = {}
    for name, tensor in ours.items():
        name = "model." + name if name.startswith("norm.") else name
        for a, b in renamed.items():
            name = name.replace(a, b)
        theirs[name] = tensor
    return theirs


def hugging_face(ours: GPT | GPTClassifier) -> tuple[torch.nn.Module, Callable]:
    """The same model in transformers, with the weights of ours, and the function that renames our
    tensors."""
    transformers = pytest.importorskip("transformers")
    c = ours.config if isinstance(ours, GPT) else ours.gpt.config
    common = dict(
        vocab_size=c.vocab_size,
        tie_word_embeddings=c.tie_weights,
        bos_token_id=None,
        eos_token_id=None,
    )
    if c.pos == "learned":
        config = transformers.GPT2Config(
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            layer_norm_epsilon=c.norm_eps or 1e-5,
            **common,
        )
        make, names = transformers.GPT2LMHeadModel, as_gpt2
    else:
        kind = "Qwen3" if c.qk_norm else "Llama"
        config = getattr(transformers, kind + "Config")(
            hidden_size=c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            head_dim=c.n_embd // c.n_head,
            max_position_embeddings=c.block_size,
            intermediate_size=ours.blocks[0].mlp.fc.out_features,
            rms_norm_eps=c.norm_eps or 1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
            **common,
        )
        make, names = getattr(transformers, kind + "ForCausalLM"), as_llama
    weights = dict(ours.named_parameters())
    if isinstance(ours, GPTClassifier):
        config.num_labels, config.pad_token_id = ours.head.out_features, 0
        make = transformers.GPT2ForSequenceClassification
        head = weights.pop("head.weight")
        weights = names({name.removeprefix("gpt."): w for name, w in weights.items()}) | {
            "score.weight": head
        }
    else:
        weights = names(weights)
    config._attn_implementation = "eager"
    theirs = make(config).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return theirs, names


@pytest.mark.parametrize(
    "config",
    [
        GPT2,
        replace(GPT2, norm_eps=0.01),
        QWEN3,
        replace(QWEN3, tie_weights=False, norm_eps=0.01),
        replace(QWEN3, n_kv_head=4),
        LLAMA,
    ],
    ids=["gpt2", "gpt2-epsilon", "qwen3", "qwen3-untied", "qwen3-no-gqa", "llama"],
)
def test_equals_hugging_face(config):
    """Logits, loss and every gradient are those of transformers with the same weights."""
    ours = lively(GPT(config))
    theirs, names = hugging_face(ours)
    idx = tokens(config, 3, config.block_size)
    assert_close(ours(idx), theirs(idx).logits)

    targets = next_tokens(idx)
    loss = ours(idx, targets) / (targets != IGNORE).sum()
    expected = theirs(idx, labels=idx).loss
    assert_close(loss, expected)

    loss.backward()
    expected.backward()
    mine, reference = names(gradients(ours)), gradients(theirs)
    assert mine.keys() == reference.keys()
    for name, grad in mine.items():
        assert_close(grad, reference[name])


def test_classifier_equals_hugging_face_with_padding_on_the_right():
    ours = lively(GPTClassifier(GPT(GPT2), n_classes=3))
    theirs, _ = hugging_face(ours)
    lengths = torch.tensor([GPT2.block_size, 5, 1])
    idx = tokens(GPT2, 3, GPT2.block_size).clamp(min=1)  # 0 is their padding
    idx[torch.arange(GPT2.block_size) >= lengths[:, None]] = 0
    assert_close(ours(idx, lengths), theirs(idx).logits)


# --- naive references -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("n_kv_head", [0, 2, 1])
def test_attention_equals_a_loop_over_heads_and_positions(n_kv_head):
    """Query head h looks through key/value head h // (H / K), at itself and what is to its left."""
    config = replace(GPT2, n_kv_head=n_kv_head)
    model = lively(GPT(config))
    attn, seen = model.blocks[0].attn, {}
    attn.register_forward_hook(lambda _, args, out: seen.update(x=args[0][0], y=out[0]))
    model(tokens(config, 1, 7))

    x, D, H, K = seen["x"], attn.head_size, config.n_head, n_kv_head or config.n_head
    q, k, v = attn.q(x), attn.k(x), attn.v(x)
    heads = torch.zeros(7, config.n_embd)
    for h in range(H):
        mine, shared = slice(h * D, (h + 1) * D), slice(h // (H // K) * D, (h // (H // K) + 1) * D)
        for t in range(7):
            scores = torch.stack([q[t, mine] @ k[s, shared] / math.sqrt(D) for s in range(t + 1)])
            heads[t, mine] = sum(a * v[s, shared] for s, a in enumerate(scores.softmax(0)))
    assert_close(seen["y"], attn.proj(heads))


def test_swiglu_hidden_width_is_eight_thirds_in_steps_of_64():
    for width, hidden in ((768, 2048), (32, 128), (48, 128), (64, 192)):
        mlp = GPT(replace(QWEN3, n_embd=width, n_layer=1)).blocks[0].mlp
        assert mlp.fc.out_features == mlp.gate.out_features == mlp.proj.in_features == hidden


@torch.no_grad()
def test_relu2_squares_what_is_positive():
    mlp = lively(GPT(SMALL)).blocks[0].mlp
    x = torch.randn(5, SMALL.n_embd)
    hidden = x @ mlp.fc.weight.T
    hidden[hidden < 0] = 0
    assert_close(mlp(x), (hidden * hidden) @ mlp.proj.weight.T)


@torch.no_grad()
def test_rotary_scores_depend_on_the_distance_only():
    """A text at positions 9 to 15, with nothing before it, reads like the same text at the
    beginning; with learned positions it does not."""
    for config, same in ((SMALL, True), (GPT2, False)):
        model, idx = lively(GPT(config)), tokens(config, 1, 6)
        first, later = model.trunk(idx), model.trunk(idx, start=9)
        assert torch.allclose(first, later, atol=1e-5) == same


# --- the cache ------------------------------------------------------------------------------------


@every_form
@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 24, [24], [5, 1, 9, 2, 7], [1, 23], [23, 1]], ids=str)
def test_reading_in_pieces_equals_reading_at_once(config, pieces):
    model, idx = lively(GPT(config)), tokens(config, 2, 24)
    cache, start, states = model.new_cache(batch=2), 0, []
    for n in pieces:
        states.append(model.trunk(idx[:, start : start + n], cache=cache, start=start))
        start += n
    assert_close(model.lm_head(torch.cat(states, dim=1)), model(idx))


@every_form
@torch.no_grad()
def test_taking_back_is_only_a_smaller_start(config):
    """What an undone turn left in the cache, beyond the new end, is never read."""
    model, idx, undone = lively(GPT(config)), tokens(config, 1, 24), tokens(config, 1, 15, seed=2)
    cache = model.new_cache()
    model.trunk(idx[:, :9], cache=cache)
    model.trunk(undone, cache=cache, start=9)
    for start, end in ((9, 13), (13, 14), (14, 24)):
        h = model.trunk(idx[:, start:end], cache=cache, start=start)
        assert_close(model.lm_head(h), model(idx)[:, start:end])


@every_form
@torch.no_grad()
def test_rows_of_a_batch_go_on_from_positions_of_their_own(config):
    """Rows of 3, 9 and 6 tokens are read padded to 9, then each goes on in pieces of 1, 4 and 1:
    what the padding left in the cache must not be seen."""
    model, idx = lively(GPT(config)), tokens(config, 3, 24)
    expected, cache = model(idx), model.new_cache(batch=3, length=16)
    starts = torch.tensor([3, 9, 6])
    is_real = torch.arange(9) < starts[:, None]
    model.trunk(torch.where(is_real, idx[:, :9], 0), cache=cache)
    for n in (1, 4, 1):
        at = starts[:, None] + torch.arange(n)
        h = model.trunk(idx.gather(1, at), cache=cache, start=starts)
        rows = torch.arange(3)[:, None]
        assert_close(model.lm_head(h), expected[rows, at])
        starts = starts + n


def test_more_than_block_size_is_refused_with_both_numbers():
    model = GPT(SMALL)
    with pytest.raises(AssertionError, match="25 tokens exceed block_size=24"):
        model(tokens(SMALL, 1, 25))
    with pytest.raises(AssertionError, match="25 tokens exceed block_size=24"):
        model.trunk(tokens(SMALL, 1, 5), cache=model.new_cache(), start=20)


# --- the loss -------------------------------------------------------------------------------------


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return LinearCrossEntropy.apply(h, weight, targets, cross_entropy_slice)


def test_loss_and_gradients_equal_cross_entropy_over_many_slices():
    """With 2**16 rows in the vocabulary a slice has 64 positions: here three whole ones, the second
    of them without any target, and a rest of 8."""
    V, C, N = 2**16, 4, 200
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, C, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(V, C, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (N,), generator=generator)
    targets[64:128] = targets[3] = IGNORE
    loss = linear_cross_entropy(h, w, targets)
    grads = torch.autograd.grad(3 * loss, (h, w))  # 3: the gradient that arrives from above is used
    expected = F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="sum")
    assert_close(loss, expected, 1e-10)
    for mine, reference in zip(grads, torch.autograd.grad(3 * expected, (h, w)), strict=True):
        assert_close(mine, reference, 1e-10)


def test_loss_passes_gradcheck():
    targets = torch.tensor([2, IGNORE, 0, 6, 6])
    h = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (h, w))


def sampled_loss(h: Tensor, weight: Tensor, targets: Tensor, negatives: int) -> Tensor:
    classes, places, bias = sample_classes(targets, len(weight), negatives)
    return LinearCrossEntropy.apply(h, weight[classes], places, cross_entropy_slice, bias)


def test_sampled_classes_estimate_the_sum_of_all_without_bias():
    """A class that stands for too many others would shift every probability."""
    torch.manual_seed(0)
    V = 50
    targets = torch.tensor([3, IGNORE, 7, 3])
    exponentials = torch.rand(V, dtype=torch.float64)
    estimates = []
    for _ in range(4000):
        classes, places, correction = sample_classes(targets, V, 5)
        assert len(classes) == len(set(classes.tolist())) == 7  # two targets and five others
        assert places[1] == IGNORE and classes[places[[0, 2, 3]]].tolist() == [3, 7, 3]
        estimates.append((exponentials[classes] * correction.exp()).sum())
    estimates = torch.stack(estimates)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - exponentials.sum()) < 4 * error


def test_sampled_loss_is_the_exact_one_where_nothing_is_left_out():
    """With as many negatives as there are other classes the estimate has nothing to estimate."""
    targets = torch.tensor([2, IGNORE, 0, 6, 6])
    h = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    exact = linear_cross_entropy(h, w, targets)
    sampled = sampled_loss(h, w, targets, 6)
    assert_close(sampled, exact, 1e-12)
    for a, b in zip(
        torch.autograd.grad(sampled, (h, w)), torch.autograd.grad(exact, (h, w)), strict=True
    ):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("negatives", [1, 6, 40])
def test_a_fixed_number_of_classes_gives_the_same_loss(negatives):
    """A GPU takes as many classes whatever the targets are: those too many must count nothing."""
    targets = torch.tensor([2, IGNORE, 0, 6, 6, 2])
    h = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for fixed in (False, True):
        torch.manual_seed(4)
        classes, places, bias = sample_classes(targets, 20, negatives, fixed)
        assert len(classes) == min(20, (6 if fixed else 3) + negatives)
        loss = LinearCrossEntropy.apply(h, w[classes], places, cross_entropy_slice, bias)
        results.append((loss, *torch.autograd.grad(loss, (h, w))))
    for one, other in zip(*results, strict=True):
        assert_close(other, one, 1e-12)


class NoHostReads(TorchDispatchMode):
    """Fails where the host would wait for a GPU: it reads a number, or a size that depends on
    numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"), name
        is_index = name in ("index", "index_put_") and args[1] is not None
        if is_index:
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            assert not masks, f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def test_classes_are_sampled_without_a_look_at_them():
    """Each look made a GPU wait for the CPU that waited for it, three times a micro-batch."""
    targets = torch.tensor([2, IGNORE, 0, 6, 6])
    with NoHostReads():
        sample_classes(targets, 20, 4, fixed=True)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            sample_classes(targets, 20, 4)


def test_sampled_loss_has_the_gradient_of_its_estimate():
    """Each draw is a function of its own: its gradient is checked with the draw held."""
    targets = torch.tensor([2, IGNORE, 0, 6, 6])
    h = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        torch.manual_seed(3)
        return sampled_loss(h, w, targets, 4)

    assert torch.autograd.gradcheck(loss, (h, w))


def test_the_loss_is_sampled_in_training_only():
    """An evaluation with sampled classes would flatter the model."""
    model, idx = lively(GPT(SMALL)), tokens(SMALL, 2, 8)
    exact = model(idx, idx)
    model.negatives = 2
    assert_close(model.eval()(idx, idx), exact, 1e-12)
    assert model.train()(idx, idx) != exact


def test_loss_without_any_target_is_zero_and_so_are_its_gradients():
    model, idx = lively(GPT(SMALL)), tokens(SMALL, 2, 8)
    loss = model(idx, torch.full_like(idx, IGNORE))
    loss.backward()
    assert loss == 0 and all(not grad.any() for grad in gradients(model).values())


class Watch(TorchDispatchMode):
    """Sees every operation: the most elements any of them returned, and the number of matrix
    products."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_keeps_the_precision_of_its_input_under_autocast(monkeypatch, dtype):
    """A GPU's autocast computes a norm in float32, which it would be asked to be without: queries
    and keys were twice as wide. (A CPU's leaves norms alone, so that one looks at the switch.)"""
    original = F.rms_norm

    def watched(*args) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return original(*args)

    monkeypatch.setattr(F, "rms_norm", watched)
    norm = RMSNorm(8)
    x = torch.randn(2, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == dtype and norm(x).equal(y)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_logits_of_a_batch_never_exist(autocast):
    """(B*T, V) is the largest tensor of a naive training step by far; no operation, forward or
    backward, makes it."""
    config = replace(SMALL, vocab_size=2**16, n_embd=8, n_layer=1)
    model, idx = GPT(config), tokens(config, 10, 24)
    with Watch() as watch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(idx, next_tokens(idx)).backward()
    assert watch.largest <= 64 * config.vocab_size < idx.numel() * config.vocab_size
    assert model.wte.weight.grad.any()


def test_evaluation_does_not_pay_for_gradients():
    """Without gradients the loss costs the matrix products of the logits, not twice as many more:
    validation at the price of a forward. (Inside an autograd.Function `needs_input_grad` is true of
    a weight even under no_grad.)"""
    model, idx = GPT(SMALL), tokens(SMALL, 2, 24)
    with torch.no_grad():
        with Watch() as logits:
            model(idx)
        with Watch() as loss:
            model(idx, next_tokens(idx))
    assert loss.products == logits.products


def test_four_micro_batches_of_one_equal_one_of_four():
    """The loss is a sum: divided once by the targets of the whole step, accumulation changes
    nothing, although the rows have 23, 3, 11 and 1 targets. (A mean of means would weigh the last
    row's only target like 23.)"""
    model, idx = lively(GPT(QWEN3).double()), tokens(QWEN3, 4, 24)
    targets = next_tokens(idx)
    for row, n in enumerate((23, 3, 11, 1)):
        targets[row, n:] = IGNORE
    total = (targets != IGNORE).sum()

    (model(idx, targets) / total).backward()
    whole = gradients(model)
    model.zero_grad(set_to_none=True)
    for row in range(4):
        (model(idx[row : row + 1], targets[row : row + 1]) / total).backward()
    for name, grad in gradients(model).items():
        assert_close(grad, whole[name], 1e-12)


# --- who sees whom --------------------------------------------------------------------------------


@every_form
@torch.no_grad()
def test_packed_dialogues_equal_each_alone(config):
    """With segments, three dialogues packed into a row know nothing of each other, positions
    included; without, the later ones read on. A second row, cut elsewhere, shows that rows do not
    share their cuts."""
    model, idx = lively(GPT(config)), tokens(config, 2, 24)
    cuts = ((0, 5, 6, 24), (0, 13, 20, 24))
    segments = torch.zeros_like(idx)
    for row, (_, a, b, _) in enumerate(cuts):
        segments[row, a:] += 1
        segments[row, b:] += 1
    packed, plain = model(idx, segments=segments), model(idx)
    for row, cut in enumerate(cuts):
        for start, end in zip(cut, cut[1:], strict=False):
            alone = model(idx[row : row + 1, start:end])[0]
            assert_close(packed[row, start:end], alone)
            assert (start == 0) == torch.allclose(plain[row, start:end], alone, atol=1e-3)


@every_form
@torch.no_grad()
def test_a_later_token_does_not_change_what_came_before(config):
    model, idx = lively(GPT(config)), tokens(config, 1, 24)
    before = model(idx)
    idx[0, 10] = (idx[0, 10] + 1) % config.vocab_size
    after = model(idx)
    assert_close(after[:, :10], before[:, :10])
    assert not torch.isclose(after[:, 10:], before[:, 10:]).all(-1).any(), (
        "every later position sees the change"
    )


@every_form
@torch.no_grad()
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_padding_cannot_change_a_classification(config, pool):
    """Nor what it is padded with, nor how far: each text is scored as if alone."""
    model, idx = lively(GPTClassifier(GPT(config), 3, pool)), tokens(config, 3, 24)
    lengths = torch.tensor([24, 7, 1])
    scores = model(idx, lengths)
    for row, n in enumerate(lengths.tolist()):
        assert_close(scores[row], model(idx[row : row + 1, :n], lengths[row : row + 1])[0])


@torch.no_grad()
def test_mean_pooling_is_the_mean_of_the_real_states():
    model, idx = lively(GPTClassifier(GPT(SMALL), 3, "mean")), tokens(SMALL, 2, 24)
    lengths = torch.tensor([10, 24])
    states = model.gpt.trunk(idx)
    for row, scores in enumerate(model(idx, lengths)):
        assert_close(
            scores, model.head(torch.stack([states[row, t] for t in range(lengths[row])]).mean(0))
        )


@every_form
def test_the_last_block_answers_for_the_last_token_alone(config):
    """What the head does not read is not computed: same scores and gradients as from every
    position's hidden state, without the last MLP's work. Only the language-model loss needs every
    position."""
    model, idx = lively(GPTClassifier(GPT(config), 3, "last")), tokens(config, 3, 24)
    lengths = torch.tensor([24, 7, 1])
    expected = model.head(model.gpt.trunk(idx)[torch.arange(3), lengths - 1])
    expected.square().sum().backward()
    wanted = gradients(model)
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as few:
        scores = model(idx, lengths)
    scores.square().sum().backward()
    assert_close(scores, expected)
    for name, grad in gradients(model).items():
        if grad is not None or wanted[name] is not None:  # an lm_head of its own has no part in it
            assert_close(grad, wanted[name])

    with FlopCounterMode(display=False) as both_blocks:
        model.gpt.trunk(idx)
    assert few.get_total_flops() < 0.75 * both_blocks.get_total_flops()
    with torch.no_grad():
        assert_close(model(idx, lengths, next_tokens(idx))[0], expected)


# --- initialisation, counts, settings -------------------------------------------------------------


@every_form
def test_initialisation_is_that_of_gpt2(config):
    """0.02, the projections into the residual stream less by sqrt(2 n_layer), biases 0, norms 1:
    every tensor."""
    config = replace(config, vocab_size=256, n_embd=128, n_layer=8, block_size=128)
    model = GPTClassifier(GPT(config), n_classes=64)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.02 / 4 if name.endswith("proj.weight") else 0.02  # sqrt(2 * 8) = 4
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < std / 10, name
    assert sum(name.endswith("proj.weight") for name, _ in model.named_parameters()) == 16
    first = F.cross_entropy(
        model.gpt(tokens(config, 4, 64)).flatten(0, 1), tokens(config, 4, 64, seed=2).flatten()
    )
    assert abs(first - math.log(256)) < 0.1, "an untrained model knows nothing"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"n_head": 0}, "n_head=0 must be at least 1"),
        ({"n_embd": 0}, "n_embd=0 must be at least 1"),
        ({"n_embd": 34}, "n_embd=34 is not divisible by n_head=4"),
        ({"n_embd": 20}, "rotary positions need an even head size, n_embd/n_head is 5"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"n_kv_head": 8}, "n_head=4 is not divisible by n_kv_head=8"),
        ({"n_kv_head": -1}, "n_head=4 is not divisible by n_kv_head=-1"),
        ({"dropout": 1.0}, "dropout=1.0 must be in [0, 1)"),
        ({"dropout": -0.1}, "dropout=-0.1 must be in [0, 1)"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06 must not be negative"),
        ({"mlp_width": -64}, "mlp_width=-64 must not be negative"),
    ],
)
def test_check_names_the_problem(change, problem):
    assert problem in replace(SMALL, **change).check()


def test_check_accepts_every_form_and_collects_all_problems():
    assert all(config.check() == [] for config in FORMS.values())
    assert replace(GPT2, n_embd=20).check() == [], "learned positions do not need an even head size"
    assert len(replace(SMALL, n_layer=0, n_embd=33, n_kv_head=3, dropout=2.0).check()) == 4


@every_form
def test_flops_per_token_is_what_pytorch_counts(config):
    """PyTorch's counter, over forward and backward of one block, attention as plain matrix
    products."""
    model, idx = GPT(config), tokens(config, 1, config.block_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, next_tokens(idx)).backward()
    assert counter.get_total_flops() == flops_per_token(config) * config.block_size


def test_flops_per_token_by_hand():
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32  # q; k and v of 2 heads; proj
    mlp = 3 * 32 * 128  # 8/3 * 32 = 85.3, rounded up to a multiple of 64
    head = 96 * 32
    scores = 2 * 24 * 32  # q k^T and weights v, multiply-adds over 24 positions
    assert flops_per_token(QWEN3) == 6 * (2 * (attention + mlp + scores) + head)


def test_flops_of_a_sampled_loss_are_those_of_the_classes_it_reads(monkeypatch):
    """MFU would count products that nobody made. A GPU reads as many as there can be."""
    config = replace(SMALL, vocab_size=960)
    model, idx = GPT(config).train(), tokens(config, 1, config.block_size)
    model.negatives = 8
    monkeypatch.setattr("model.sample_classes", lambda *args: sample_classes(*args[:3], fixed=True))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    classes = most_classes(config.block_size, config.vocab_size, 8)
    assert classes == config.block_size + 8
    assert counter.get_total_flops() == flops_per_token(config, classes) * config.block_size


@torch.no_grad()
def test_dropout_acts_in_training_only():
    plain, dropping = lively(GPT(SMALL)), lively(GPT(replace(SMALL, dropout=0.3)))
    idx = tokens(SMALL, 1, 24)
    assert torch.equal(plain(idx), dropping(idx))
    dropping.train()
    assert not torch.allclose(dropping(idx), dropping(idx))
    assert not torch.allclose(dropping(idx), plain(idx))


@pytest.mark.slow
def test_compiled_parts_equal_eager_and_the_block_is_compiled_once(monkeypatch):
    """The slow test of this file. Ten layers: were each compiled for itself, the ninth would meet
    PyTorch's limit of recompilations and silently stay eager. The graphs are captured and
    differentiated as always but run as they are: turning them into C++ is PyTorch's business, takes
    half a minute and needs a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = replace(QWEN3, n_layer=10)
    model, idx = lively(GPT(config)).train(), tokens(config, 2, 24)
    eager = model(idx, next_tokens(idx))
    eager.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_parts()
    compiled = model(idx, next_tokens(idx))
    compiled.backward()
    assert_close(compiled, eager)
    for name, grad in gradients(model).items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, (
        "one block and one slice of the softmax"
    )
    torch._dynamo.reset()
