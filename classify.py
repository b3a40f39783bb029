"""Labels and probabilities of texts, from a fine-tuned checkpoint or, without training, from a language model.

    python classify.py checkpoints/sentiment "房间很干净" "又脏又吵"
    python classify.py checkpoints/sentiment --file reviews.txt --json > labels.jsonl
    cat reviews.txt | python classify.py checkpoints/sentiment
    python classify.py checkpoints/chat_zh "又脏又吵" --cloze neg=差 --cloze pos=好 --template "{text}很{word}。"

One text a line; a pair is two texts with a tab between them. Answers come in the order of the texts: label,
probability, text, with tabs between; an empty line is answered by an empty label.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from model import GPT, GPTClassifier, GPTConfig
from smallgpt import checkpoint, dist, runs, settings
from smallgpt.examples import encode_text, in_order, pad
from smallgpt.settings import UserError

CHUNK = 2048  # texts read, sorted by length and answered together
MAX_TOKENS = 4096  # of a forward pass, padding counted: what fits a CPU's cache

Scorer = Callable[[list[str]], torch.Tensor]  # texts -> log-probabilities (N, labels)


def classifier(path: str, device: torch.device, dtype: torch.dtype) -> tuple[list[str], Scorer]:
    """The labels of a fine-tuned checkpoint, and what scores texts by it."""
    found = runs.required(path)
    if not (head := found.meta.get("head")):
        raise UserError(f"{path} is a language model without a classification head: fine-tune it first (python "
                        f"sentiment_train.py trunk={path}), or ask it for words with --cloze")  # fmt: skip
    config, tokenizer = runs.shape(found, GPTConfig), checkpoint.tokenizer_of(found)
    model = GPTClassifier(GPT(config), len(head["labels"]), head["pool"], head["mask"])
    checkpoint.load_weights(found, model)
    model = model.to(device, dtype).eval()
    size = head["block_size"]

    @torch.inference_mode()
    def score(texts: list[str]) -> torch.Tensor:
        pairs = [text.partition("\t")[::2] for text in texts]
        ids = [encode_text(tokenizer, a, b.strip(), size, head["prefix"])[0] for a, b in pairs]
        found = torch.empty(len(ids), len(head["labels"]))
        width = 0 if head["mask"] else size
        for rows in in_order([len(i) for i in ids], MAX_TOKENS, width):
            idx, lengths = pad([ids[i] for i in rows], tokenizer.pad, width)
            found[rows] = model(idx.to(device), lengths.to(device)).float().log_softmax(-1).cpu()
        return found

    return head["labels"], score


def cloze(path: str, words: dict[str, list[str]], template: str, device: torch.device, dtype: torch.dtype
          ) -> tuple[list[str], Scorer]:  # fmt: skip
    """The labels, and what scores texts by how likely a language model finds each label's words in the template.

    Of each word the log-likelihood given the text less that given no text (Holtzman et al. 2021, Surface form
    competition: a frequent word is not a frequent label); the best word of a label counts."""
    found, model, tokenizer = checkpoint.open_model(path, GPT, GPTConfig)
    model = model.to(device, dtype).eval()
    size = model.config.block_size

    def filled(text: str, word: str) -> tuple[list[int], int]:
        """Ids of the template, and how many of them come before the word."""
        before, after = template.split("{word}")
        end = tokenizer.encode(word + after)
        a, b = before.split("{text}")
        fixed = [tokenizer.bos, *tokenizer.encode(a)], tokenizer.encode(b)
        room = size - len(end) - len(fixed[0]) - len(fixed[1])
        if room < 1:
            raise UserError(f"the template leaves no room for a text in {size} tokens: make it shorter")
        body = tokenizer.encode(text)
        start = [*fixed[0], *body[max(0, len(body) - room):], *fixed[1]]  # the end of a long text stays: it is nearest
        return [*start, *end], len(start)

    @torch.inference_mode()
    def likelihood(texts: list[str], word: str) -> torch.Tensor:
        rows = [filled(text, word) for text in texts]
        result = torch.empty(len(rows))
        for batch in in_order([len(ids) for ids, _ in rows], MAX_TOKENS, 0):
            idx, lengths = pad([rows[i][0] for i in batch], tokenizer.pad)
            h = model.trunk(idx.to(device))
            n_end = len(rows[0][0]) - rows[0][1]  # the word and what follows it, the same in every row
            at = (lengths[:, None] - n_end - 1 + torch.arange(n_end)).to(device)  # (B, n_end): each predicts the next
            logits = model.lm_head(h.gather(1, at[..., None].expand(-1, -1, h.size(-1)))).float()
            wanted = idx.to(device).gather(1, at + 1)
            result[batch] = logits.log_softmax(-1).gather(2, wanted[..., None]).sum((1, 2)).cpu()
        return result

    prior = {w: likelihood([""], w) for w in itertools.chain(*words.values())}

    def score(texts: list[str]) -> torch.Tensor:
        best = [torch.stack([likelihood(texts, w) - prior[w] for w in ws]).amax(0) for ws in words.values()]
        return torch.stack(best, 1).log_softmax(-1)

    return list(words), score


def answers(lines: Iterator[str], score: Scorer) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(text, probabilities) of each line, in order; None for an empty one."""
    while chunk := [line.rstrip("\r\n") for line in itertools.islice(lines, CHUNK)]:
        full = [i for i, text in enumerate(chunk) if text.strip()]
        scores = dict(zip(full, score([chunk[i] for i in full]).exp() if full else [], strict=True))
        for i, text in enumerate(chunk):
            yield text, scores.get(i)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run or step folder of sentiment_train.py (with --cloze: of train.py)")
    parser.add_argument("text", nargs="*", help="texts; without any, lines of --file or of standard input")
    parser.add_argument("--file", type=Path, help="file with one text a line")
    parser.add_argument("--json", action="store_true", help="answers as JSON Lines, with the probability of each label")
    parser.add_argument("--cloze", action="append", metavar="LABEL=WORD,WORD", help="a label and its words")
    parser.add_argument("--template", default="{text} {word}", help='where text and word go ("{text} {word}")')
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    device = dist.choose_device(args.device)
    dtype, _ = dist.choose_dtype("auto", device)
    if args.cloze:
        words = {k: [w for w in v.split(",") if w] for k, _, v in (entry.partition("=") for entry in args.cloze)}
        if len(words) < 2 or not all(words.values()):
            raise UserError("give at least two labels with words: --cloze negative=bad,awful --cloze positive=good")
        if args.template.count("{text}") != 1 or not 0 <= args.template.find("{text}") < args.template.find("{word}"):
            raise UserError('--template must hold {text} once and {word} behind it, such as "{text} It was {word}."')
        labels, score = cloze(args.run, words, args.template, device, dtype)
    else:
        labels, score = classifier(args.run, device, dtype)
    with open(args.file, encoding="utf-8-sig", errors="replace") if args.file else nullcontext(sys.stdin) as file:
        for text, p in answers(iter(args.text or file), score):
            best = None if p is None else int(p.argmax())
            if args.json:
                each = None if p is None else {k: round(v, 6) for k, v in zip(labels, p.tolist(), strict=True)}
                record = {"text": text, "label": None if p is None else labels[best], "probabilities": each}
                print(json.dumps(record, ensure_ascii=False))
            else:
                print("\t\t" if p is None else f"{labels[best]}\t{p[best]:.4f}\t{text}")


if __name__ == "__main__":
    settings.cli(main)
