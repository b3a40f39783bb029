"""Where the public sets come from, and fetching them."""

import hashlib
import urllib.request
from http.client import HTTPException
from pathlib import Path

from smallgpt.settings import UserError


def _at(folder: str, files: dict[str, str]) -> dict[str, tuple[str, str]]:
    """File -> sha256 of a folder on GitHub as {file: (its address, its sha256)}."""
    return {
        file: (f"https://raw.githubusercontent.com/{folder}/{file}", digest)
        for file, digest in files.items()
    }


SOURCES = {  # set -> {file: (its address, its sha256)}
    "chnsenticorp": _at(
        "SophonPlus/ChineseNlpCorpus/HEAD/datasets/ChnSentiCorp_htl_all",
        {
            "ChnSentiCorp_htl_all.csv": "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0",
        },
    ),
    "online_shopping": _at(
        "SophonPlus/ChineseNlpCorpus/HEAD/datasets/online_shopping_10_cats",
        {
            "online_shopping_10_cats.zip": "6816ded66fde9d0927ecbd370b5e12d0174d1abac35192ec014ac2a0a8d25858",
        },
    ),
    "sst2": _at(
        "F0restL1n/BERT/HEAD/glue_data/SST-2",
        {
            "train.tsv": "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
            "dev.tsv": "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
        },
    ),
    "mrpc": _at(
        "wasiahmad/paraphrase_identification/HEAD/dataset/msr-paraphrase-corpus",
        {
            "msr_paraphrase_train.txt": "61a88818ec384d8465297dda1883b469f1b22d442ab90183d13e06233b180591",
            "msr_paraphrase_test.txt": "0360d0d3427a0ae14882e2b3a799df0fab6cb5203d5e8ee481949283da62acb6",
        },
    )
    | _at(
        "F0restL1n/BERT/HEAD/glue_data/MRPC",
        {
            "dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
        },
    ),
    "tweets": _at(
        "kawehburg/Tweet-Sentiment-Extraction/HEAD/data",
        {
            "train.csv": "192204063468a632b2601f6e833c42d7875b618d1a6e5c9529ad8ca58ee6be75",
            "test.csv": "4d1fc2995ce88eb7d435f18563e93361f35956c3e74ed22572b9614eff6d04e6",
        },
    ),
}
SOURCES["online_shopping_9"] = SOURCES["online_shopping"]


def fetch(name: str, to: Path) -> list[Path]:
    """Download the files of a set into a folder, and check that they are what we know. Files that are there stay."""
    to.mkdir(parents=True, exist_ok=True)
    for file, (address, digest) in SOURCES[name].items():
        target = to / file
        if target.exists():
            if hashlib.sha256(target.read_bytes()).hexdigest() != digest:
                raise UserError(
                    f"{target} is not the file of {name}: move it, or choose another folder with --to"
                )
            continue
        by_hand = (
            f"get {file} from {address} by other means and put it at {target} (sha256 {digest})"
        )
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read(1 << 28)
        except (OSError, HTTPException) as problem:
            raise UserError(f"could not download {file} of {name} ({problem}): {by_hand}") from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise UserError(
                f"what {address} gave is not the file we know, and was not kept: {by_hand}"
            )
        temporary = target.with_name(f".{file}.tmp")
        temporary.write_bytes(content)
        temporary.replace(target)
    return [to / file for file in SOURCES[name]]
