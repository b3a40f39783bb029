"""What the first bytes of a file say: the same to everything that reads files of others."""

import bz2
import io
import lzma
import pickle
import tarfile
import zipfile

import pytest

from smallgpt import files


def zipped(**content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return packed.getvalue()


def tarred() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    return packed.getvalue()


@pytest.mark.parametrize(
    "content, name",
    [
        (zipped(a=b"text"), "a zip archive"),
        (zipped(), "a zip archive"),
        (tarred(), "a tar archive"),
        (bz2.compress(b"text", 1), "compressed with bzip2"),
        (bz2.compress(b"text", 9), "compressed with bzip2"),
        (lzma.compress(b"text"), "compressed with xz"),
        (pickle.dumps(["text"], 2), "a pickle"),
        (pickle.dumps(["text"]), "a pickle"),
    ],
)
def test_what_is_no_text_is_known(content, name):
    """Regression: only bzip2 of level 9 was known to chats, and no tar or pickle to classify."""
    assert files.kind_of(content[: files.HEAD]).name == name


@pytest.mark.parametrize(
    "text",
    ["", "a", "BZh", "BZh1 is a word", "PK", "PAR1 is one, too", "ARROW1,b\n1,2\n", "ustar" * 99],
)
def test_a_text_is_no_archive(text):
    """Regression: a text or a table whose first word was BZh or ARROW1 was refused."""
    assert files.kind_of(text.encode()) == files.UNKNOWN


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(encoding):
    """UTF-32 begins with the mark of UTF-16 and was taken for it."""
    content = "房间\n".encode(encoding)
    assert files.marked_encoding(content) == encoding
    assert content.decode(files.marked_encoding(content)) == "房间\n"
    assert files.marked_encoding("房间".encode()) == ""
