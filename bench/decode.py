"""Speed of a reply: this project, Hugging Face and nanoGPT side by side, in alternating rounds.

    python bench/decode.py --nanogpt ~/nanoGPT --json decode.json   about three minutes on two cores

A round is one reply at batch 1: a prompt is read and 200 tokens are generated, greedily, none of
which may end it.
"""

import argparse
from collections.abc import Callable
from functools import partial

from common import (
    GPT2_FORM,
    Contender,
    arguments,
    compete,
    gpt2_of_hugging_face,
    import_nanogpt,
    shape,
)

WHY = {
    "float32": "the weights' own precision",
    "bfloat16": "as asked, weights in bf16",
    "float16": "as asked, weights in fp16",
}


def ours(args: argparse.Namespace, dtype: str, form: dict) -> Contender:
    """What chat.py does for a line, from the text of the prompt to the text of the reply:
    Conversation.reply()."""
    import torch

    from model import GPT, GPTConfig
    from smallgpt import hardware
    from smallgpt.sampling import Conversation, SampleSettings
    from smallgpt.tokenizer import TokenizerSettings, train
    from smallgpt.weights.precision import set_precision

    n_characters = args.vocab_size - 256 - 6  # beside the bytes and the marks
    alphabet = "".join(chr(0x4E00 + i) for i in range(n_characters))
    tokenizer = train(TokenizerSettings("char", args.vocab_size, min_count=1), [alphabet])
    model = GPT(GPTConfig(**shape(args), **form))
    with torch.no_grad():
        # score 0 of thousands: never the likeliest
        model.lm_head.weight[[tokenizer.sep, tokenizer.end]] = 0
    set_precision(model.eval(), dtype, hardware.choose_device(args.device))
    greedy = SampleSettings(temperature=0, repetition_penalty=1.0, max_tokens=args.new)
    talk = Conversation(model, tokenizer, greedy)
    text = alphabet[: args.prompt - 2]  # and the marks around it

    def reply() -> None:
        talk.reset()
        talk.say(text)
        assert len(talk.ids) == args.prompt
        for _ in talk.reply():
            pass
        assert talk.reply_tokens == args.new, f"the reply has {talk.reply_tokens} tokens"

    return Contender(reply, args.new, dtype, False, WHY[dtype] + "; the loop of chat.py")


def hugging_face(args: argparse.Namespace, dtype: str) -> Contender:
    import torch

    model = gpt2_of_hugging_face(args).to(args.device, getattr(torch, dtype)).eval()
    prompt = torch.randint(args.vocab_size, (1, args.prompt)).to(args.device)

    def generate() -> None:
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            use_cache=True,
            min_new_tokens=args.new,
            max_new_tokens=args.new,
            pad_token_id=0,
        )
        assert out.shape[1] == args.prompt + args.new

    return Contender(generate, args.new, dtype, False, WHY[dtype] + "; generate() with its cache")


def nanogpt(args: argparse.Namespace, dtype: str) -> Contender:
    import torch

    m = import_nanogpt(args.nanogpt)
    model = m.GPT(m.GPTConfig(**shape(args), dropout=0.0, bias=False))
    model.to(args.device, getattr(torch, dtype)).eval()
    prompt = torch.randint(args.vocab_size, (1, args.prompt)).to(args.device)

    def generate() -> None:
        out = model.generate(prompt, args.new, top_k=1)
        assert out.shape[1] == args.prompt + args.new

    return Contender(
        generate, args.new, dtype, False, WHY[dtype] + "; generate(), which has no cache"
    )


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    p.add_argument("--new", type=int, default=200, help="tokens of the reply")
    p.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(WHY),
        default=["float32"],
        help="of the weights; a table for each",
    )
    args = p.parse_args()
    if args.prompt + args.new >= args.block_size:
        p.error(f"--prompt and --new together must be less than --block-size={args.block_size}")
    kinds: dict[str, Callable] = {
        "ours, GPT-2 form": partial(ours, form=GPT2_FORM),
        "ours, default form": partial(ours, form={}),
        "Hugging Face GPT-2": hugging_face,
    }
    if args.nanogpt:
        kinds["nanoGPT"] = nanogpt
    groups = []
    for dtype in args.dtype:
        groups.append({f"{name}, {dtype}": partial(kinds[name], dtype=dtype) for name in kinds})
    compete(args, *groups)


if __name__ == "__main__":
    main()
