"""Labels and probabilities of texts, from a fine-tuned checkpoint or, without training, from a language model.

    python scripts/classify.py checkpoints/sentiment "房间很干净" "又脏又吵"
    python scripts/classify.py checkpoints/sentiment --file reviews.txt --json > labels.jsonl
    cat reviews.txt | python scripts/classify.py checkpoints/sentiment
    python scripts/classify.py checkpoints/chat_zh --cloze neg=差 --cloze pos=好 --template "{text}很{word}。" "又脏又吵"

One text a line; for a model of pairs, two texts with a tab between them. Answers come in the order of the texts: label,
probability, text, with tabs between; an empty line is answered by an empty label.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from model import GPT, GPTClassifier
from smallgpt import console, hardware
from smallgpt.console import UserError
from smallgpt.runs import checkpoint
from smallgpt.sentiment.batches import collate, encode_text, length_batches
from smallgpt.weights.pretrained import open_model

CHUNK = 2048  # texts read, sorted by length and answered together
BATCH = 16384  # at most so many tokens per forward pass

Scorer = Callable[[list[str]], torch.Tensor]  # texts -> log-probabilities (N, labels)


def classifier(path: str, device: torch.device, dtype: torch.dtype) -> tuple[list[str], Scorer]:
    """The labels of a fine-tuned checkpoint, and what scores texts by it, as sentiment_train.py scores the test."""
    found = checkpoint.required(path)
    if not (head := found.meta.get("head")):
        raise UserError(
            f"{path} is a language model without a classification head: fine-tune it first (python "
            f"sentiment_train.py trunk={path}), or ask it for words with --cloze"
        )
    config, tokenizer = (
        checkpoint.model_config(found.meta["model"], path),
        checkpoint.tokenizer_of(found),
    )
    model = GPTClassifier(GPT(config), len(head["labels"]), head["pool"], head["mask"])
    checkpoint.load_weights(found, model)
    model = model.to(device).eval()
    size, pairs = head["block_size"], found.meta.get("pairs", True)  # older versions did not say
    width = 0 if head["mask"] else size

    @torch.inference_mode()
    def score(texts: list[str]) -> torch.Tensor:
        both = [text.partition("\t")[::2] if pairs else (text, "") for text in texts]
        ids = [
            encode_text(tokenizer, a.strip(), b.strip(), size, head["prefix"])[0] for a, b in both
        ]
        result = torch.empty(len(ids), len(head["labels"]))
        for rows in length_batches([len(i) for i in ids], BATCH, width, device):
            idx, lengths = collate([ids[i] for i in rows], tokenizer.pad, width)
            with hardware.autocast(device, dtype):
                scores = model(idx.to(device), lengths.to(device))
            result[rows] = scores.float().log_softmax(-1).cpu()
        return result

    return head["labels"], score


def cloze(
    path: str, words: dict[str, list[str]], template: str, device: torch.device, dtype: torch.dtype
) -> tuple[list[str], Scorer]:
    """The labels, and what scores texts by how likely a language model finds each label's words in the template.

    Of each word the log-likelihood given the text less that given no text (Holtzman et al. 2021, Surface form
    competition: a frequent word is not a frequent label); the best word of a label counts."""
    _, model, tokenizer = open_model(path)
    model = model.to(device).eval()
    size = model.config.block_size
    before, after = template.split("{word}")
    space = before[
        len(before.rstrip()) :
    ]  # it belongs to the word: tokens begin with the space before them
    first, second = before.rstrip().split("{text}")
    first, second = [tokenizer.bos, *tokenizer.encode(first)], tokenizer.encode(second)

    @torch.inference_mode()
    def likelihood(texts: list[str], word: str) -> torch.Tensor:
        """Log-likelihood (N,) of the word and what follows it, given what comes before it."""
        end = tokenizer.encode(space + word + after)
        room = size - len(first) - len(second) - len(end)
        if room < 1:
            raise UserError(
                f"the template leaves no room for a text in {size} tokens: make it shorter"
            )
        # the end of a long text stays: it is nearest to the word
        rows = [[*first, *tokenizer.encode(text.strip())[-room:], *second, *end] for text in texts]
        result = torch.empty(len(rows))
        for batch in length_batches([len(row) for row in rows], BATCH, 0, device):
            idx, lengths = (t.to(device) for t in collate([rows[i] for i in batch], tokenizer.pad))
            with hardware.autocast(device, dtype):
                h = model.trunk(idx)
            # positions whose next token is one of the word's
            at = lengths[:, None] - len(end) - 1 + torch.arange(len(end), device=device)  # (B, n)
            logits = model.lm_head(h.gather(1, at[..., None].expand(-1, -1, h.size(-1))).float())
            wanted = idx.gather(1, at + 1)[..., None]
            result[batch] = logits.log_softmax(-1).gather(2, wanted).sum((1, 2)).cpu()
        return result

    prior = {word: likelihood([""], word) for word in itertools.chain(*words.values())}

    def score(texts: list[str]) -> torch.Tensor:
        best = [
            torch.stack([likelihood(texts, w) - prior[w] for w in ws]).amax(0)
            for ws in words.values()
        ]
        return torch.stack(best, 1).log_softmax(-1)

    return list(words), score


def label_words(entries: list[str]) -> dict[str, list[str]]:
    """["neg=bad,awful", "pos=good"] -> {"neg": ["bad", "awful"], "pos": ["good"]}"""
    pairs = [entry.partition("=")[::2] for entry in entries]
    words = {
        label.strip(): [w.strip() for w in text.split(",") if w.strip()] for label, text in pairs
    }
    if not 2 <= len(words) == len(entries) or not all(words) or not all(words.values()):
        raise UserError(
            "give two or more labels, each once and with its words: --cloze neg=bad,awful --cloze pos=good"
        )
    return words


def answers(
    lines: Iterable[str], score: Scorer, chunk: int = CHUNK
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(text, probabilities) of each line, in order; None for an empty one."""
    lines = iter(lines)
    while texts := [
        line.lstrip("\ufeff").rstrip("\r\n") for line in itertools.islice(lines, chunk)
    ]:
        full = [i for i, text in enumerate(texts) if text.strip()]
        scores = dict(zip(full, score([texts[i] for i in full]).exp() if full else [], strict=True))
        yield from ((text, scores.get(i)) for i, text in enumerate(texts))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", help="run or step folder of sentiment_train.py (with --cloze: of train.py)"
    )
    parser.add_argument(
        "text", nargs="*", help="texts; without any, lines of --file or of standard input"
    )
    parser.add_argument("--file", type=Path, help="file with one text a line, in UTF-8")
    parser.add_argument(
        "--json",
        action="store_true",
        help="answers as JSON Lines, with the probability of each label",
    )
    parser.add_argument(
        "--cloze", action="append", metavar="LABEL=WORD,WORD", help="a label and its words"
    )
    parser.add_argument(
        "--template", default="{text} {word}", help='where text and word go ("{text} {word}")'
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    args = parser.parse_intermixed_args(argv)  # texts may also follow an option
    if args.file and args.text:
        raise UserError("give texts or --file, not both")
    where = args.template.find("{text}"), args.template.find("{word}")
    if (
        args.template.count("{text}") != 1
        or args.template.count("{word}") != 1
        or where[0] > where[1]
    ):
        raise UserError(
            '--template must hold {text} once and behind it {word} once, such as "{text} It was {word}."'
        )
    return args


def main() -> None:
    args = parse()
    device = hardware.choose_device(args.device)
    dtype, _ = hardware.choose_dtype(args.dtype, device)
    with redirect_stdout(sys.stderr):  # what opening a checkpoint says is no answer
        if args.cloze:
            labels, score = cloze(args.run, label_words(args.cloze), args.template, device, dtype)
        else:
            labels, score = classifier(args.run, device, dtype)
    typed = not args.text and not args.file and sys.stdin.isatty()
    if typed:
        print("one text a line, a tab between the two of a pair; Ctrl-D ends", file=sys.stderr)
    broken = 0
    with (
        open(args.file, encoding="utf-8", errors="replace")
        if args.file
        else nullcontext(sys.stdin) as file
    ):
        for text, p in answers(args.text or file, score, 1 if typed else CHUNK):
            broken += "\ufffd" in text
            best = None if p is None else int(p.argmax())
            if args.json:
                each = (
                    None
                    if p is None
                    else {k: round(v, 6) for k, v in zip(labels, p.tolist(), strict=True)}
                )
                record = {
                    "text": text,
                    "label": None if p is None else labels[best],
                    "probabilities": each,
                }
                print(json.dumps(record, ensure_ascii=False))
            else:
                text = text.replace("\n", " ")  # of an argument: one answer a line
                print("\t\t" if p is None else f"{labels[best]}\t{p[best]:.4f}\t{text}")
    if broken:
        print(
            f"{broken} of the texts hold bytes that are not UTF-8, or U+FFFD in their place",
            file=sys.stderr,
        )


if __name__ == "__main__":
    console.run(main)
