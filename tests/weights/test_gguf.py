"""A GGUF is read to the bit, and a damaged one ends in a sentence, whatever its bytes are."""

import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from smallgpt.console import UserError
from smallgpt.weights import gguf

FACTS = {
    "general.architecture": "llama",
    "a.text": "héllo 你好",
    "a.count": 7,
    "a.number": 0.25,
    "a.switch": True,
    "a.list": [1, 2, 3],
    "a.names": ["x", "", "你"],
}


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)


@pytest.fixture
def file(theirs, matrix, tmp_path) -> Path:
    """Facts of every kind, and a matrix in two types."""
    file = tmp_path / "x.gguf"
    writer = theirs.GGUFWriter(file, "llama")
    writer.add_string("a.text", FACTS["a.text"])
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.number", 0.25)
    writer.add_bool("a.switch", True)
    writer.add_array("a.list", [1, 2, 3])
    writer.add_array("a.names", FACTS["a.names"])
    for name in ("F32", "Q8_0"):
        kind = theirs.GGMLQuantizationType[name]
        writer.add_tensor(name, theirs.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refused(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        gguf.read(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_facts_and_tensors_are_those_that_were_written(file, matrix):
    opened = gguf.read(file)
    assert opened.facts == FACTS
    assert opened.tensors.shapes == {"F32": (5, 64), "Q8_0": (5, 64)}
    assert opened.tensors["F32"].equal(torch.from_numpy(matrix))
    opened.tensors["F32"].add_(1)  # what was read may be written to
    assert opened.tensors["F32"].equal(torch.from_numpy(matrix))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_numbers_are_unpacked_as_ggml_does(theirs, matrix, name):
    kind = theirs.GGMLQuantizationType[name]
    packed = theirs.quantize(matrix, kind)
    size, n_values, unpack = gguf.BLOCKS[kind.value]
    assert theirs.constants.GGML_QUANT_SIZES[kind] == (n_values, size)
    blocks = np.frombuffer(packed.tobytes(), np.uint8).reshape(-1, size)
    found = gguf.read_blocks(blocks, unpack, matrix.shape)
    assert found.dtype == torch.float32
    assert found.equal(torch.from_numpy(theirs.dequantize(packed, kind).copy()))
    assert gguf.TYPE_NAMES[kind.value] == name


def test_a_type_that_cannot_be_read_is_named(theirs, tmp_path):
    writer = theirs.GGUFWriter(tmp_path / "x.gguf", "llama")
    packed = np.zeros((2, 144), np.uint8)
    writer.add_tensor("big", packed, raw_dtype=theirs.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refused(tmp_path / "x.gguf")
    assert "big is of type Q4_K, and can be read here as F32, F16, BF16" in message


def test_a_file_that_is_cut_short_anywhere_is_one_sentence(file):
    """A download that broke off; at most 31 bytes at the end are padding."""
    content = file.read_bytes()
    for length in range(0, len(content) - 31, 13):
        file.write_bytes(content[:length])
        message = refused(file)
        assert "cut short" in message or "is no GGUF file" in message


def test_damage_anywhere_is_one_sentence_or_another_value(file):
    """A changed byte may ask for a text of 2**60 bytes or for ten billion tensors."""
    content = file.read_bytes()
    header = content.index(b"Q8_0") + 60
    draw = random.Random(0)
    refusals = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[draw.randrange(4, header)] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            opened = gguf.read(file)
            for tensor in opened.tensors.values():
                assert tensor.dtype == torch.float32
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 50


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_another_version_is_named(file, version):
    content = file.read_bytes()
    file.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
    assert f"is of version {version} of GGUF" in refused(file)
