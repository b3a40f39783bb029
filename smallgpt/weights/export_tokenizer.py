"""A Tokenizer as the files of transformers, with the same ids, and back.

    tokenizer_json, tokenizer_config   the content of the files
    is_exported, read_exported         tokenizer.json -> Tokenizer

tiktoken merges the two neighbours whose union has the lowest rank. So does a BPE that may merge
every split of every token into two tokens, in the order of the ranks (`ignore_merges`: a piece that
is a token is not merged at all).
"""

from typing import Any

from smallgpt.tokenizer import (
    BPE_PATTERN,
    CHAR_PATTERN,
    SPECIALS,
    STAND_INS,
    Tokenizer,
    bytes_of,
)

CHARACTER = r"[\s\S]"  # CHAR_PATTERN in the words of Oniguruma, which tokenizers uses
PRINTED = {byte: character for character, byte in STAND_INS.items()}

# As `add_leading_space`: a space is put before every text, and taken away again unless a letter of
# a script with spaces follows. (To insert it before such a letter only makes tokenizers fail.)
NEEDLESS_SPACE = {"Regex": r"\A (?![\p{L}&&[^\x{2e80}-\x{10ffff}]])"}
EDGES = {"Regex": r"\A[\s\x1c-\x1f]+|[\s\x1c-\x1f]+\z"}  # what str.strip() takes away

# A dialogue of turns, and the beginning of the next one where a reply is wanted. A system prompt
# follows an empty turn, as in `Tokenizer.encode_turns`.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|sep|>' if message['role'] == 'system' else '' }}"
    "{{ message['content'] }}"
    "{{ '<|end|>' if loop.last and not add_generation_prompt else '<|sep|>' }}"
    "{% endfor %}"
)


def tokenizer_json(
    tokenizer: Tokenizer, prefix: bool = True, strips: bool = False
) -> dict[str, Any]:
    """The content of tokenizer.json.

    prefix: a text begins with <|bos|>. strips: the text of a classifier, which loses the spaces
    around it and may get one before its first word."""
    ids = {printed(token): id for token, id in tokenizer.encoding._mergeable_ranks.items()}
    specials = named_once(tokenizer.encoding._special_tokens)
    pattern = tokenizer.encoding._pat_str
    split = {"Regex": CHARACTER if pattern == CHAR_PATTERN else pattern}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    added = [added_token(name, id) for name, id in specials.items()]
    vocabulary = ids | specials  # the ids of added tokens would follow the others without gaps
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer(tokenizer, strips),
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": template(tokenizer, prefix),
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": merges(tokenizer),
        },
    }


def named_once(specials: dict[str, int]) -> dict[str, int]:
    """Special tokens in the order of their ids, each with one name: ours, where it has another."""
    by_id = {id: name for name, id in specials.items()}
    by_id |= {specials[name]: name for name in SPECIALS}
    return {by_id[id]: id for id in sorted(by_id)}


def printed(token: bytes) -> str:
    """A token as the files of transformers spell it, with a printable character for each byte."""
    return "".join(PRINTED[byte] for byte in token)


def merges(tokenizer: Tokenizer) -> list[list[str]]:
    """Every split of every token into two tokens, in the order of the ranks."""
    ranks = tokenizer.encoding._mergeable_ranks
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for at in range(1, len(token)):
            first, second = token[:at], token[at:]
            if first in ranks and second in ranks:
                found.append([printed(first), printed(second)])
    return found


def added_token(name: str, id: int) -> dict[str, Any]:
    is_stripped = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": id, "content": name, **is_stripped, "normalized": False, "special": True}


def normalizer(tokenizer: Tokenizer, strips: bool) -> dict[str, Any] | None:
    """What changes a text before it is split; None where nothing does."""
    steps: list[dict[str, Any]] = []
    if strips:
        steps.append({"type": "Replace", "pattern": EDGES, "content": ""})
    if strips and tokenizer.kind != "char":
        steps.append({"type": "Prepend", "prepend": " "})
        steps.append({"type": "Replace", "pattern": NEEDLESS_SPACE, "content": ""})
    if tokenizer.lowercase:
        steps.append({"type": "Lowercase"})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def template(tokenizer: Tokenizer, prefix: bool) -> dict[str, Any]:
    """<|bos|> A, or <|bos|> A <|sep|> B."""
    bos, sep = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("<|bos|>", "<|sep|>"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    begin = [bos] if prefix else []
    ids = {"<|bos|>": tokenizer.bos, "<|sep|>": tokenizer.sep}
    special_tokens = {}
    for name, id in ids.items():
        special_tokens[name] = {"id": name, "ids": [id], "tokens": [name]}
    return {
        "type": "TemplateProcessing",
        "single": [*begin, first],
        "pair": [*begin, first, sep, second],
        "special_tokens": special_tokens,
    }


def tokenizer_config(longest: int, is_classifier: bool) -> dict[str, Any]:
    """The content of tokenizer_config.json. longest: of a text, in tokens."""
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
    }
    if is_classifier:  # what spells a special token is text
        return found | {"split_special_tokens": True, "padding_side": "right"}
    return found | {"chat_template": CHAT_TEMPLATE, "padding_side": "left"}


def is_exported(content: dict[str, Any]) -> bool:
    """Was this tokenizer.json made here?"""
    model = content.get("model")
    ignores_merges = isinstance(model, dict) and model.get("ignore_merges") is True
    added = content.get("added_tokens")
    if not ignores_merges or not isinstance(added, list):
        return False
    tokens = [token for token in added if isinstance(token, dict)]
    names = {token.get("content") for token in tokens}
    return names >= set(SPECIALS)


def read_exported(content: dict[str, Any]) -> Tokenizer:
    """The Tokenizer of a tokenizer.json that was made here.

    KeyError, TypeError or AttributeError where the content is damaged, ValueError where it would
    not be lossless."""
    model = content["model"]
    specials = {token["content"]: token["id"] for token in content["added_tokens"]}
    split, _ = content["pre_tokenizer"]["pretokenizers"]
    pattern = split["pattern"]["Regex"]
    if pattern == CHARACTER:
        pattern = CHAR_PATTERN
    kind = {CHAR_PATTERN: "char", BPE_PATTERN: "bpe"}.get(pattern, "tiktoken")
    ids = {token: id for token, id in model["vocab"].items() if token not in specials}
    ranks = [b""] * (max(ids.values()) + 1)
    for token, id in ids.items():
        ranks[id] = bytes_of(token)
    steps = (content.get("normalizer") or {}).get("normalizers", [])
    lowercase = any(step["type"] == "Lowercase" for step in steps)
    return Tokenizer(kind, pattern, ranks, specials, lowercase)
