"""Text to token ids and back: characters, trained byte-level BPE, or an encoding published with tiktoken.

Every tokenizer here is one `tiktoken.Encoding` over bytes. So any text comes back exactly (lone surrogates as U+FFFD;
capitals as small letters where `lowercase` is asked for), there is no <unk>, and text that spells a special token is
encoded like any other: nobody can type the end of a dialogue. The special ids follow the ordinary ones.
"""

import base64
import codecs
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken

from smallgpt.console import UserError
from smallgpt.settings import Count, Positive

FORMAT = 1  # of tokenizer.json
SPECIALS = (
    "<|bos|>",
    "<|sep|>",
    "<|end|>",
    "<|pad|>",
    "<|cls|>",
    "<|pair|>",
)  # the last two are kept for later
BYTES = [bytes([b]) for b in range(256)]
# The printable character that GPT-2's files (and Hugging Face's ByteLevel) write for each byte, in id order.
STAND_INS = {chr(b): b for b in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))}
STAND_INS |= {
    chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(STAND_INS.values())))
}

CHAR_PATTERN = r"(?s:.)"
# No token crosses these pieces, as in GPT-2 and GPT-4. Han is kept apart from other letters, as Chinese puts
# no space around a Latin word. There is no look-around: the match is linear in time, and a million spaces
# cannot overflow the regex engine's stack as they do in GPT-4's pattern.
BPE_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # it's, we'll
    r"| ?[\p{L}\p{M}&&[^\p{Han}]]+"  # a word with the space before it
    r"|\p{Han}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+|\s+"  # punctuation and emoji; other spaces
)


@dataclass
class TokenizerSettings:
    kind: str = "char"  # char | bpe | a tiktoken encoding such as gpt2 or cl100k_base
    vocab_size: Positive = 8192  # upper limit, special tokens included (char, bpe)
    min_count: Count = 2  # characters seen fewer times are spelled in bytes (char)
    lowercase: bool = False  # read all text in lower case, as the uncased BERT does (char, bpe)

    def check(self) -> list[str]:
        kinds = ("char", "bpe", *tiktoken.list_encoding_names())
        if self.kind not in kinds:
            return [f"there is no tokenizer {self.kind!r}: choose one of {', '.join(kinds)}"]
        if self.lowercase and self.kind not in ("char", "bpe"):
            return [f"lowercase is for char and bpe: {self.kind} was published with capitals"]
        if self.kind in ("char", "bpe") and self.vocab_size < len(BYTES) + len(SPECIALS):
            return [
                f"vocab_size={self.vocab_size} must be at least 262: 256 bytes and 6 special tokens"
            ]
        return []


class Tokenizer:
    """An immutable vocabulary. `ranks[i]` is what id i spells, in merge order; b"" is an id that nobody uses.
    `specials` are an encoding's own; ours follow. ValueError where the parts would not be lossless."""

    def __init__(
        self,
        kind: str,
        pattern: str,
        ranks: Sequence[bytes],
        specials: dict[str, int],
        lowercase: bool = False,
    ) -> None:
        first = max([len(ranks), *(i + 1 for i in specials.values())])
        specials = {name: first + i for i, name in enumerate(SPECIALS)} | specials
        names = {i: name for name, i in specials.items()}
        ids = {token: i for i, token in enumerate(ranks) if token}
        distinct = len(ids) == len(ranks) - ranks.count(b"") and len(names) == len(specials)
        if not distinct or names.keys() & ids.values() or not ids.keys() >= set(BYTES):
            raise ValueError(
                "two tokens share an id or a spelling, or one of the 256 bytes is missing"
            )
        self.kind, self.lowercase = kind, lowercase
        self.vocab_size = max(names) + 1
        self.bos, self.sep, self.end, self.pad, self.cls, self.pair = (
            specials[name] for name in SPECIALS
        )
        self.encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ids, special_tokens=specials
        )
        spellings = [base64.b64encode(token).decode("ascii") for token in ranks]
        self._content = dict(
            format=FORMAT, kind=kind, pattern=pattern, ranks=spellings, specials=specials
        )
        self._content |= {"lowercase": True} if lowercase else {}
        self.hash = _hash(self._content)
        # Dictionaries, so that a negative id (an ignored target) is a KeyError and not the last token.
        self._spelled = dict.fromkeys(range(self.vocab_size), b"") | dict(enumerate(ranks))
        self._named = self._spelled | {i: name.encode("utf-8") for i, name in names.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; never a special id, whatever the text spells."""
        return self.encoding.encode_ordinary(text.lower() if self.lowercase else text)

    def encode_dialogue(self, turns: Sequence[str]) -> list[int]:
        """[bos] turn [sep] turn ... turn [end]"""
        ids = [self.bos]
        for i, turn in enumerate(turns):
            if i:
                ids.append(self.sep)
            ids += self.encode(turn)
        return ids + [self.end]

    def encode_dialogues(self, batch: Iterable[Sequence[str]]) -> np.ndarray:
        """Many dialogues one after the other, uint32 (n_tokens,)."""
        return np.fromiter(chain.from_iterable(map(self.encode_dialogue, batch)), dtype=np.uint32)

    def decode(self, ids: Iterable[int], errors: str = "replace", specials: bool = False) -> str:
        """The text of ids; special tokens are left out, or written by name if `specials`. `errors` is that of
        bytes.decode, for ids that end inside a character. KeyError for an id outside the vocabulary."""
        table = self._named if specials else self._spelled
        return b"".join(table[int(i)] for i in ids).decode("utf-8", errors)

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self._spelled)

    def token_bytes(self) -> np.ndarray:
        """int64 (vocab_size,): the bytes of a chat file that each id stands for; sep is a newline, end that
        and a blank line. So bits per byte can be compared between any two tokenizers that keep capitals."""
        sizes = np.array([len(self._spelled[i]) for i in range(self.vocab_size)], dtype=np.int64)
        sizes[self.sep], sizes[self.end] = 1, 2
        return sizes

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, atomically: a reader sees the old file or the new one, never a part."""
        partial = Path(f"{path}.{os.getpid()}.tmp")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(self._content | {"hash": self.hash}, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read what `save` wrote. UserError naming the file where it is missing, damaged or edited."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"it is not a tokenizer of format {FORMAT}")
            if content.pop("hash", None) != _hash(content):
                raise ValueError("its content does not match its hash")
            ranks = [base64.b64decode(token) for token in content["ranks"]]
            return cls(
                content["kind"],
                content["pattern"],
                ranks,
                content["specials"],
                content.get("lowercase", False),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no usable tokenizer: {error}; restore it or train again"
            ) from error


class StreamDecoder:
    """Turns ids into text as they come, holding back the bytes of an unfinished character."""

    def __init__(self, spelled: dict[int, bytes]) -> None:
        self._spelled = spelled
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters this id completes, often none; special tokens give none."""
        return self._utf8.decode(self._spelled[int(id)])

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character was never finished, else nothing."""
        return self._utf8.decode(b"", final=True)


def train(
    settings: TokenizerSettings, texts: Callable[[], Iterable[str]] | Iterable[str]
) -> Tokenizer:
    """The tokenizer that the settings ask for, from one pass over the texts (one utterance each); a published encoding
    reads none. Repeatable; memory does not grow with the texts; the vocabulary may stay smaller than vocab_size."""
    if problems := settings.check():
        raise UserError("; ".join(problems))
    if settings.kind not in ("char", "bpe"):
        return named(settings.kind)
    texts = texts() if callable(texts) else texts
    texts = map(str.lower, texts) if settings.lowercase else texts
    room = settings.vocab_size - len(BYTES) - len(SPECIALS)
    if settings.kind == "char":
        pattern, ranks = CHAR_PATTERN, BYTES + _characters(texts, room, settings.min_count)
    else:
        pattern, ranks = BPE_PATTERN, BYTES + _merges(texts, room)
    return Tokenizer(settings.kind, pattern, ranks, {}, settings.lowercase)


def named(kind: str) -> Tokenizer:
    """An encoding published with tiktoken, which downloads it once. It keeps all of its own ids."""
    if problems := TokenizerSettings(kind).check():
        raise UserError(problems[0])
    try:
        encoding = tiktoken.get_encoding(kind)
    except (
        OSError,
        ValueError,
    ) as error:  # the exceptions of requests are OSErrors that know their request
        fix = str(error)
        if request := getattr(error, "request", None):
            name = hashlib.sha1(
                request.url.encode("utf-8")
            ).hexdigest()  # its name in tiktoken's cache
            fix = f"save {request.url} as {name} in a folder, and set TIKTOKEN_CACHE_DIR to that folder"
        raise UserError(f"the tokenizer {kind} could not be downloaded: {fix}") from error
    token_of = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    ranks = [token_of.get(rank, b"") for rank in range(max(token_of) + 1)]
    return Tokenizer(kind, encoding._pat_str, ranks, encoding._special_tokens)


def bytes_of(token: str) -> bytes:
    """What a token of GPT-2's files spells. KeyError for a character that stands for no byte."""
    return bytes(STAND_INS[c] for c in token)


def _characters(texts: Iterable[str], room: int, min_count: int) -> list[bytes]:
    """The frequent characters beyond ASCII, most frequent first."""
    counts = Counter(chain.from_iterable(texts))
    frequent = sorted((c for c in counts if counts[c] >= min_count), key=lambda c: (-counts[c], c))
    spelled = [c.encode("utf-8", "ignore") for c in frequent]
    return [token for token in spelled if len(token) > 1][
        :room
    ]  # one byte is ASCII, none a lone surrogate


def _merges(texts: Iterable[str], room: int) -> list[bytes]:
    """The merged tokens of byte-level BPE, in the order in which they were learned."""
    import tokenizers as hf  # only training needs it

    split = hf.pre_tokenizers.Split(hf.Regex(BPE_PATTERN), "isolated")
    spell = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.Sequence([split, spell])
    options = dict(min_frequency=2, initial_alphabet=list(STAND_INS), show_progress=False)
    trainer = hf.trainers.BpeTrainer(vocab_size=len(BYTES) + room, **options)
    bpe.train_from_iterator(_sample(texts), trainer)
    vocab = bpe.get_vocab()
    return [bytes_of(token) for token in sorted(vocab, key=vocab.__getitem__) if len(token) > 1]


def _sample(texts: Iterable[str], limit: int = 8_000_000) -> list[str]:
    """Texts from all over, at most `limit` characters (BPE then takes under 1 GB and half a minute). When
    there are more, half is dropped and half of what follows: at random, since speakers alternate."""
    rng, chance, kept, size = random.Random(0), 1.0, [], 0
    for text in texts:
        if rng.random() < chance:
            kept.append(text.encode("utf-8", "replace").decode("utf-8"))  # no lone surrogates
            size += len(text)
        if size > limit and len(kept) > 1:
            chance /= 2
            kept = kept[:1] + [text for text in kept[1:] if rng.random() < 0.5]
            size = sum(map(len, kept))
    return kept


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()
