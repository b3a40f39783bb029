"""Text to token ids and back: characters, trained byte-level BPE, or an encoding published with
tiktoken.

Every tokenizer here is one `tiktoken.Encoding` over bytes. So any text comes back exactly (lone
surrogates as U+FFFD; capitals as small letters where `lowercase` is set), and there is no <unk>.
Text that spells a special token is encoded like any other: nobody can type the end of a dialogue.
The special ids follow the ordinary ones."""

import base64
import codecs
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken

from smallgpt.console import UserError
from smallgpt.files import write_atomic
from smallgpt.settings import Count, Positive

FORMAT = 1  # of tokenizer.json
# the last two are for classifiers
SPECIALS = ("<|bos|>", "<|sep|>", "<|end|>", "<|pad|>", "<|cls|>", "<|pair|>")
BYTES = [bytes([b]) for b in range(256)]
# BPE reads a sample: with four times as many characters a token, its tokens hold 0.3 % more text.
CHARACTERS_PER_TOKEN = 256
MOST_CHARACTERS = 8_000_000  # under 1 GB and half a minute
# The printable character that GPT-2's files (and Hugging Face's ByteLevel) write for each byte, in
# id order: itself, or one from 256 on.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
UNPRINTABLE = sorted(set(range(256)) - set(PRINTABLE))
STAND_INS = {chr(byte): byte for byte in PRINTABLE}
STAND_INS |= {chr(256 + i): byte for i, byte in enumerate(UNPRINTABLE)}

CHAR_PATTERN = r"(?s:.)"
# No token crosses these pieces, as in GPT-2 and GPT-4. Han is kept apart from other letters, as
# Chinese puts no space around a Latin word. There is no look-around: the match is linear in time,
# and a million spaces cannot overflow the regex engine's stack as they do in GPT-4's pattern.
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


@dataclass(frozen=True)
class Published:
    """What the published model that a tokenizer belongs to knows of its ids."""

    rows: int  # ids from here on were added here: the model has never read them
    system: str | None = None  # its default system prompt; None = it has learned no ChatML turns


class Tokenizer:
    """An immutable vocabulary.

    `ranks[i]` is what id i spells, in merge order; b"" is an id that nobody uses. `specials` are an
    encoding's own; ours follow, but for those that are named there as the same as one of its own
    ({"<|bos|>": 1, "<|im_start|>": 1}). ValueError where the parts would not be lossless."""

    def __init__(
        self,
        kind: str,
        pattern: str,
        ranks: Sequence[bytes],
        specials: dict[str, int],
        lowercase: bool = False,
        published: Published | None = None,
    ) -> None:
        last_special = max(specials.values(), default=-1)
        n_ordinary = max(len(ranks), last_special + 1)
        ours = {name: n_ordinary + i for i, name in enumerate(SPECIALS)}
        specials = ours | specials  # an id's own name comes last, and is the one that is shown
        names = {id: name for name, id in specials.items()}
        ids = {token: id for id, token in enumerate(ranks) if token}
        if not _is_lossless(ranks, ids, specials):
            raise ValueError(
                "two tokens share an id or a spelling, or one of the 256 bytes is missing"
            )
        self.kind = kind
        self.lowercase = lowercase
        self.published = published
        self.vocab_size = max(names) + 1
        special_ids = [specials[name] for name in SPECIALS]
        self.bos, self.sep, self.end, self.pad, self.cls, self.pair = special_ids
        self.encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=ids, special_tokens=specials
        )
        self._content = {
            "format": FORMAT,
            "kind": kind,
            "pattern": pattern,
            "ranks": [base64.b64encode(token).decode("ascii") for token in ranks],
            "specials": specials,
        }
        if lowercase:
            self._content["lowercase"] = True
        if published is not None:
            self._content["published"] = asdict(published)
        self.hash = _hash(self._content)
        # Dictionaries: a negative id (an ignored target) is a KeyError, not the last token.
        self._spelled = dict.fromkeys(range(self.vocab_size), b"")
        self._spelled |= enumerate(ranks)
        self._named = self._spelled | {id: name.encode("utf-8") for id, name in names.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; never a special id, whatever the text spells."""
        if self.lowercase:
            text = text.lower()
        return self.encoding.encode_ordinary(text)

    def encode_turns(self, turns: Sequence[str], roles: Sequence[str] = ()) -> list[list[int]]:
        """A dialogue in pieces: [bos], then each turn with the token that closes it, a [sep] or at
        last the [end].

        A system prompt begins with a [sep] of its own: to the model, it follows an empty turn."""
        pieces = [[self.bos]]
        last = len(turns) - 1
        for i, turn in enumerate(turns):
            is_prompt = bool(roles) and roles[i] == "system"
            before = [self.sep] if is_prompt else []
            closing = self.sep if i < last else self.end
            pieces.append([*before, *self.encode(turn), closing])
        return pieces

    def decode(self, ids: Iterable[int], errors: str = "replace", specials: bool = False) -> str:
        """The text of ids; special tokens are left out, or written by name if `specials`.

        `errors` is that of bytes.decode, for ids that end inside a character. KeyError for an id
        outside the vocabulary."""
        spelling = self._named if specials else self._spelled
        utf8 = b"".join(spelling[int(id)] for id in ids)
        return utf8.decode("utf-8", errors)

    def stream(self) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self._spelled)

    def token_bytes(self) -> np.ndarray:
        """int64 (vocab_size,): the bytes of a chat file that each id stands for.

        So bits per byte can be compared between any two tokenizers that keep capitals."""
        lengths = [len(self._spelled[id]) for id in range(self.vocab_size)]
        sizes = np.array(lengths, dtype=np.int64)
        sizes[self.sep] = 1  # a newline
        sizes[self.end] = 2  # a newline and a blank line
        return sizes

    def textless(self) -> list[int]:
        """The ids that stand for no text, neither a character nor the end of a turn."""
        return (self.token_bytes() == 0).nonzero()[0].tolist()

    def special(self, name: str) -> int:
        """The id of a special token. KeyError if there is none of this name."""
        return self._content["specials"][name]

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json at once: a reader sees the old file or the new one, never a part."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self._content | {"hash": self.hash}
        write_atomic(path, json.dumps(content, indent=0))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read what `save` wrote. UserError names a file that is missing, damaged or edited."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"it is not a tokenizer of format {FORMAT}")
            if content.pop("hash", None) != _hash(content):
                raise ValueError("its content does not match its hash")
            return cls(
                content["kind"],
                content["pattern"],
                ranks=[base64.b64decode(token) for token in content["ranks"]],
                specials=content["specials"],
                lowercase=content.get("lowercase", False),
                published=Published(**content["published"]) if "published" in content else None,
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
    """The tokenizer of these settings, from one pass over the texts (one utterance each).

    A published encoding reads none. Repeatable; memory does not grow with the texts; the vocabulary
    may stay smaller than vocab_size."""
    problems = settings.check()
    if problems:
        raise UserError("; ".join(problems))
    if settings.kind not in ("char", "bpe"):
        return named(settings.kind)
    if callable(texts):
        texts = texts()
    if settings.lowercase:
        texts = map(str.lower, texts)
    room = settings.vocab_size - len(BYTES) - len(SPECIALS)
    if settings.kind == "char":
        pattern = CHAR_PATTERN
        learned = _characters(texts, room, settings.min_count)
    else:
        pattern = BPE_PATTERN
        learned = _merges(texts, room)
    return Tokenizer(settings.kind, pattern, BYTES + learned, {}, settings.lowercase)


def named(kind: str) -> Tokenizer:
    """An encoding published with tiktoken, which downloads it once. It keeps all of its own ids."""
    problems = TokenizerSettings(kind=kind).check()
    if problems:
        raise UserError(problems[0])
    try:
        encoding = tiktoken.get_encoding(kind)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer {kind} could not be downloaded: {_fix_download(error)}"
        ) from error
    token_of = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    ranks = [token_of.get(rank, b"") for rank in range(max(token_of) + 1)]
    return Tokenizer(kind, encoding._pat_str, ranks, encoding._special_tokens)


def _fix_download(error: Exception) -> str:
    """How to get tiktoken's file by other means; the error itself where it names no address."""
    request = getattr(error, "request", None)  # the exceptions of requests know their request
    if request is None:
        return str(error)
    name_in_cache = hashlib.sha1(request.url.encode("utf-8")).hexdigest()
    return (
        f"save {request.url} as {name_in_cache} in a folder, "
        "and set TIKTOKEN_CACHE_DIR to that folder"
    )


def bytes_of(token: str) -> bytes:
    """What a token of GPT-2's files spells. KeyError for a character that stands for no byte."""
    return bytes(STAND_INS[c] for c in token)


def _characters(texts: Iterable[str], room: int, min_count: int) -> list[bytes]:
    """The frequent characters beyond ASCII, most frequent first."""
    counts = Counter(chain.from_iterable(texts))
    frequent = [c for c, count in counts.items() if count >= min_count]
    frequent.sort(key=lambda c: (-counts[c], c))
    spelled = [c.encode("utf-8", "ignore") for c in frequent]
    beyond_ascii = [token for token in spelled if len(token) > 1]  # no byte: a lone surrogate
    return beyond_ascii[:room]


def _merges(texts: Iterable[str], room: int) -> list[bytes]:
    """The merged tokens of byte-level BPE, in the order in which they were learned."""
    import tokenizers as hf  # only training needs it

    vocab_size = len(BYTES) + room
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(BPE_PATTERN), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=list(STAND_INS),
        show_progress=False,
    )
    sample = _sample(texts, min(MOST_CHARACTERS, CHARACTERS_PER_TOKEN * vocab_size))
    bpe.train_from_iterator(sample, trainer)
    vocab = bpe.get_vocab()
    in_merge_order = sorted(vocab, key=vocab.__getitem__)
    return [bytes_of(token) for token in in_merge_order if len(token) > 1]


def _sample(texts: Iterable[str], limit: int) -> list[str]:
    """Texts from all over, at most `limit` characters.

    When there are more, half is dropped and half of what follows: at random, since speakers
    alternate.
    """
    rng = random.Random(0)
    chance = 1.0
    sample: list[str] = []
    size = 0
    for text in texts:
        if rng.random() < chance:
            without_surrogates = text.encode("utf-8", "replace").decode("utf-8")
            sample.append(without_surrogates)
            size += len(text)
        if size > limit and len(sample) > 1:
            chance /= 2
            first, *others = sample
            sample = [first, *(text for text in others if rng.random() < 0.5)]
            size = sum(map(len, sample))
    return sample


def _is_lossless(ranks: Sequence[bytes], ids: dict[bytes, int], specials: dict[str, int]) -> bool:
    """Has every token, ordinary or special, an id of its own, and every byte one?"""
    n_used = len(ranks) - ranks.count(b"")
    ours = {specials[name] for name in SPECIALS}
    others = [id for name, id in specials.items() if name not in SPECIALS]
    spellings_differ = len(ids) == n_used
    specials_differ = len(ours) == len(SPECIALS) and len(set(others)) == len(others)
    ids_differ = specials_differ and ours.union(others).isdisjoint(ids.values())
    has_bytes = ids.keys() >= set(BYTES)
    return spellings_differ and ids_differ and has_bytes


def _hash(content: dict) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
