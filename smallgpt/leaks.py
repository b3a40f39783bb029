"""Was a test text read in training the trunk? Searches what the trunk was trained on for the test's texts."""

import hashlib
import json
from pathlib import Path

from tqdm import tqdm

from smallgpt import reviews
from smallgpt.dialogues import read_dialogues
from smallgpt.dist import World
from smallgpt.heldout import WINDOW, HeldOut
from smallgpt.runs import write_atomic
from smallgpt.sets import ReviewSettings
from smallgpt.settings import UserError

Corpora = list[
    str | ReviewSettings
]  # text files, and labelled sets of which the training split was read


def search(texts: list[str], corpora: Corpora, cache: Path) -> tuple[int, list[str]]:
    """How many of the texts stand in the corpora, from beginning to end, and which corpora are not there to be read.
    What was found is kept in `cache`, by the texts, the names, sizes and times of the files, and the sets' examples."""
    files = [Path(c) for c in corpora if isinstance(c, str) and Path(c).is_file()]
    missing = [c for c in corpora if isinstance(c, str) and not Path(c).is_file()]
    sets = []
    for s in (c for c in corpora if isinstance(c, ReviewSettings)):
        try:
            sets.append(reviews.load(s))
        except UserError:
            missing.append(f"{s.set} in {s.path}")
    stamps = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files] + [
        r.fingerprint for r in sets
    ]
    asked = repr((WINDOW, sorted(texts), stamps)).encode("utf-8", "replace")
    kept = cache / f"leaks-{hashlib.blake2b(asked, digest_size=12).hexdigest()}.json"
    if not kept.exists():
        held = HeldOut(texts)
        for file in tqdm(files, desc="looking for test texts", disable=None, leave=False):
            held.read(turn for turns in read_dialogues(file, "replace") for turn in turns)
        for r in sets:
            held.read(text for e in r.splits["train"] for text in e[:2])
        cache.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(held.found), shared=True)
    return json.loads(kept.read_text(encoding="utf-8")), missing


def check(
    texts: list[str], trunk: str, corpora: Corpora, cache: Path, world: World, allowed: bool
) -> list[str]:
    """What `search` finds in the corpora of a trunk, in words for a report; rank 0 searches. UserError on every rank if
    anything is found and that is not `allowed`."""
    found, absent = search(texts, corpora, cache) if world.main else (0, [])
    found = int(world.sum(found)[0])
    if found and not allowed:
        raise UserError(
            f"{found} of {len(texts):,} test texts are in what {trunk} was trained on: take another trunk, train it "
            "without them (`python -m smallgpt.reviews text` writes such a text), or set allow_leaks=true"
        )
    notes = [f"test texts found in the trunk's training text: {found}"]
    if absent:
        notes.append(f"not searched for test texts, being absent: {', '.join(absent)}")
    return notes
