"""What the tests of labelled sets share."""

from pathlib import Path

import pytest

from smallgpt.console import UserError
from smallgpt.sentiment.sets import READERS, ReviewSettings, SetFiles, Splits
from smallgpt.sentiment.splits import load


def read(**settings) -> Splits:
    """What the reader of a set returns."""
    return READERS[settings["set"]](SetFiles(ReviewSettings(**settings)))


def refused(path: Path | str, **settings) -> str:
    with pytest.raises(UserError) as error:
        load(ReviewSettings(path=str(path), **settings))
    assert "\n" not in str(error.value)
    return str(error.value)
