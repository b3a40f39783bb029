"""Speed of fine-tuning: this project and Hugging Face's Trainer on the same SST-2 examples, in
alternating rounds.

    python bench/finetune.py data/SST-2 --json finetune.json        about ten minutes on two cores

A round trains a classifier of the same shape (GPT-2's form, dropout 0.1, AdamW, clipping, batches
of 32) on the same examples, encoded by the same tokenizer: once over --examples of them for the
whole model; --epochs times for a frozen trunk, our one pass that keeps what the trunk says
included. The Trainer pads each batch to its longest example.
"""

import argparse
import tempfile
from functools import cache, partial

from common import GPT2_FORM, Contender, arguments, compete, gpt2_config, shape


@cache
def data(path: str, count: int, vocab_size: int):
    """(tokenizer, encoded training examples) of SST-2."""
    from smallgpt.sentiment import splits
    from smallgpt.sentiment.batches import encode
    from smallgpt.sentiment.sets import ReviewSettings
    from smallgpt.tokenizer import TokenizerSettings, train

    found = splits.load(ReviewSettings(set="sst2", path=path, train_size=count))
    examples = found.splits["train"]
    texts = [example.text for example in examples]
    tokenizer = train(TokenizerSettings("bpe", vocab_size), texts)
    return tokenizer, encode(examples, found.labels, tokenizer, 128, [tokenizer.bos])


def ours(args: argparse.Namespace, freeze: str, epochs: int) -> Contender:
    """The parts and the order of sentiment_train.py's loop."""
    import torch
    import torch.nn.functional as F

    from model import GPT, GPTClassifier, GPTConfig
    from smallgpt import hardware
    from smallgpt.optim import OptimSettings, make_optimizers, update
    from smallgpt.parallel.strategy import Single
    from smallgpt.parallel.world import World
    from smallgpt.sentiment import freeze as freezing
    from smallgpt.sentiment.batches import Buckets, Inputs

    tokenizer, encoded = data(args.sst2, args.examples, args.vocab_size)
    device = hardware.choose_device(args.device)
    dtype, why = hardware.choose_dtype("auto", device)
    form = {**GPT2_FORM, "bias": True, "dropout": 0.1}
    config = GPTConfig(**shape(args), **form)
    model = GPTClassifier(GPT(config), 2).to(device).train()
    freezing.freeze(model, freeze, config.vocab_size)
    buckets = Buckets(encoded.lengths, 32, seed=0)
    labels = torch.from_numpy(encoded.labels).to(device)
    strategy = Single(model, World(0, 1, device), dtype)
    optimizers = make_optimizers(strategy.names(), OptimSettings(lr=1e-4))

    inputs = Inputs(encoded, tokenizer.pad, 0, device)

    def loss_of(run, rows) -> torch.Tensor:
        x, lengths, reads = inputs.of(rows)
        scores = run(x, lengths, None, reads)
        return F.cross_entropy(scores.float(), labels[rows])

    def train() -> None:
        inputs.states = []
        freezing.cache_frozen_states(strategy, inputs, 16384, 4.0)
        for step in range(epochs * buckets.steps_per_epoch):
            rows = buckets.of(step)
            loss = strategy.forward_backward([rows], loss_of, 1.0)
            norm = float(strategy.clip(optimizers, 1.0))
            update(optimizers, strategy.scaler, norm)
            float(loss)

    return Contender(train, epochs * len(encoded.ids), hardware.name_of(dtype), False, why)


def hugging_face(args: argparse.Namespace, freeze: str, epochs: int) -> Contender:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import GPT2ForSequenceClassification, Trainer, TrainingArguments

    from smallgpt import hardware

    tokenizer, encoded = data(args.sst2, args.examples, args.vocab_size)
    dtype, why = hardware.choose_dtype("auto", torch.device(args.device))
    config = gpt2_config(args, num_labels=2, pad_token_id=tokenizer.pad)
    model = GPT2ForSequenceClassification(config)
    if freeze == "trunk":
        model.transformer.requires_grad_(False)
    pairs = zip(encoded.ids, encoded.labels.tolist(), strict=True)
    rows = [{"input_ids": ids, "label": label} for ids, label in pairs]

    def collate(batch: list[dict]) -> dict:  # what DataCollatorWithPadding does, for our tokenizer
        ids = [torch.from_numpy(row["input_ids"]) for row in batch]
        ones = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad),
            "attention_mask": pad_sequence(ones, batch_first=True),
            "labels": torch.tensor([row["label"] for row in batch]),
        }

    options = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=32,
        num_train_epochs=epochs,
        learning_rate=1e-4,
        report_to=[],
        bf16=dtype == torch.bfloat16,
        use_cpu=args.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def train() -> None:
        Trainer(model, options, train_dataset=rows, data_collator=collate).train()

    return Contender(train, epochs * len(rows), hardware.name_of(dtype), False, why)


def main() -> None:
    p = arguments(__doc__)
    p.add_argument("sst2", help="folder with SST-2's train.tsv and dev.tsv")
    p.add_argument("--examples", type=int, default=512, help="training examples")
    p.add_argument("--epochs", type=int, default=10, help="passes over them with the trunk frozen")
    p.set_defaults(unit="examples", block_size=128)
    args = p.parse_args()
    full = {
        "ours, whole model": partial(ours, freeze="none", epochs=1),
        "Hugging Face Trainer, whole model": partial(hugging_face, freeze="none", epochs=1),
    }
    head = {
        "ours, frozen trunk": partial(ours, freeze="trunk", epochs=args.epochs),
        "Hugging Face Trainer, frozen trunk": partial(
            hugging_face, freeze="trunk", epochs=args.epochs
        ),
    }
    compete(args, full, head)


if __name__ == "__main__":
    main()
