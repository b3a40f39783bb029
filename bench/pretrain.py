"""Training speed: this project, Hugging Face and nanoGPT side by side, in alternating rounds.

    python bench/pretrain.py --nanogpt ~/nanoGPT --json pretrain.json about ten minutes on two cores

A round is a few whole optimizer steps: forward, backward, clipping at 1.0, AdamW. Everyone gets the
same shape, the same tokens, no dropout and the same number of threads. Peak memory is that of the
whole process, compiling included; on a GPU that of the tensors of the timed rounds.
"""

import argparse
from collections.abc import Callable
from functools import partial

from common import (
    GPT2_FORM,
    Contender,
    Skip,
    arguments,
    compete,
    gpt2_of_hugging_face,
    import_nanogpt,
    shape,
    training_step,
)

CPU_WITHOUT_BF16 = "this CPU has no bf16 matrix instructions"


def batch(args: argparse.Namespace):
    """x, y (B, T): the same random tokens for everyone."""
    import torch

    tokens = torch.randint(args.vocab_size, (args.batch, args.block_size + 1)).to(args.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def rounds_of(step: Callable[[], None], args: argparse.Namespace) -> dict:
    """What makes a round of a step."""

    def steps() -> None:
        for _ in range(args.steps):
            step()

    return {"round": steps, "tokens": args.steps * args.batch * args.block_size}


def ours(args: argparse.Namespace, form: dict) -> Contender:
    """This project through the calls of train.py."""

    from model import GPT, GPTConfig
    from smallgpt import hardware
    from smallgpt.optim import OptimSettings, make_optimizers
    from smallgpt.parallel.strategy import Spread
    from smallgpt.parallel.world import World

    device = hardware.choose_device(args.device)
    dtype, why = hardware.choose_dtype("auto", device)
    s = OptimSettings()
    compiled, why_compiled = choose_compile(args)
    strategy = Spread(World(0, 1, device)).build(GPT(GPTConfig(**shape(args), **form)), dtype)
    if compiled:
        strategy.model.compile_parts()
    optimizers = make_optimizers(strategy.names(), s)
    x, y = batch(args)
    targets = y.numel()  # train.py counts them on the CPU, as it loads a batch
    at = 0

    def step() -> None:
        nonlocal at
        training_step(strategy, optimizers, s, at, [(x, y)], targets)
        at += 1

    return Contender(
        **rounds_of(step, args),
        precision=hardware.name_of(dtype),
        compiled=compiled,
        why=f"{why}; {why_compiled}",
    )


def peer(
    model,
    optimizer,
    loss_of: Callable,
    args: argparse.Namespace,
    bf16: bool,
    compiled: bool,
    why: str,
) -> Contender:
    """The training step that the other two projects share."""
    import torch

    ctx = torch.autocast(args.device, dtype=torch.bfloat16, enabled=bf16)
    x, y = batch(args)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        with ctx:
            loss = loss_of(run, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(
        **rounds_of(step, args),
        precision="bfloat16" if bf16 else "float32",
        compiled=compiled,
        why=why,
    )


def choose_compile(args: argparse.Namespace) -> tuple[bool, str]:
    """Is a contender compiled, and why (not)?"""
    from smallgpt import hardware

    device = hardware.choose_device(args.device)
    return hardware.choose_compile("false" if args.eager else "auto", device, steps=10**6)


def has_bf16(args: argparse.Namespace) -> bool:
    from smallgpt import hardware

    return args.device == "cuda" or hardware.cpu_has_bf16()


def hugging_face(args: argparse.Namespace) -> Contender:
    import torch

    model = gpt2_of_hugging_face(args).to(args.device).train()
    bf16 = has_bf16(args)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def loss_of(run, x, y):
        return run(input_ids=x, labels=x, use_cache=False).loss  # it shifts the labels itself

    why = "bf16 autocast, where the hardware has it" if bf16 else CPU_WITHOUT_BF16
    return peer(model, optimizer, loss_of, args, bf16, False, f"{why}; eager, as people run it")


def nanogpt(args: argparse.Namespace, patched: bool) -> Contender:
    import torch

    cuda = args.device == "cuda"
    compiled, why_compiled = choose_compile(args)
    if patched and not has_bf16(args):
        raise Skip(CPU_WITHOUT_BF16)
    torch.backends.cuda.matmul.allow_tf32 = True  # as its train.py does
    torch.backends.cudnn.allow_tf32 = True
    m = import_nanogpt(args.nanogpt)
    model = m.GPT(m.GPTConfig(**shape(args), dropout=0.0, bias=False)).to(args.device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), args.device)

    def loss_of(run, x, y):
        return run(x, y)[1]

    why = "as it ships: bf16 on a GPU" if cuda else "as it ships: fp32 on CPU"
    if patched:
        why = "patched: bf16 autocast"
    how = "compile=True is its default" if compiled else f"eager: {why_compiled}"
    return peer(model, optimizer, loss_of, args, cuda or patched, compiled, f"{why}, {how}")


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--batch", type=int, default=16, help="sequences per step")
    p.add_argument("--steps", type=int, default=3, help="optimizer steps per round")
    p.set_defaults(trains=True)
    args = p.parse_args()
    contenders = {
        "ours, GPT-2 form": partial(ours, form=GPT2_FORM),
        "ours, default form": partial(ours, form={}),
        "Hugging Face GPT-2": hugging_face,
    }
    if args.nanogpt:
        contenders["nanoGPT"] = partial(nanogpt, patched=False)
        if args.device == "cpu":  # on a GPU it is bf16 as it ships
            contenders["nanoGPT, bf16"] = partial(nanogpt, patched=True)
    compete(args, contenders)


if __name__ == "__main__":
    main()
