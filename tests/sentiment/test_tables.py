"""Files of strangers: encodings, separators, quotes and zips as they come, and one clear sentence for broken ones."""

import csv
import gzip
import json
import zipfile

import pytest

from smallgpt.console import UserError
from smallgpt.sentiment.tables import column, read_table

REVIEWS = [
    ["房间很干净，服务也好", "1"],
    ['太吵了, "绝不"再来', "0"],
    ["早餐\n一般", "0"],
    ["😀", "1"],
]


TEXT = 'review,label\n房间很干净，服务也好,1\n"太吵了, ""绝不""再来",0\n"早餐\n一般",0\n😀,1\n'


def refused(path, *args) -> str:
    with pytest.raises(UserError) as error:
        read_table(path, *args)
    message = str(error.value)
    assert path.name in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-le", "utf-16-be"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings_are_found_out(tmp_path, encoding, newline):
    path = tmp_path / "x.csv"
    path.write_bytes(TEXT.replace("\n", newline).encode(encoding))
    assert read_table(path) == (["review", "label"], REVIEWS)
    assert read_table(path, "utf-8" if encoding == "utf-8-sig" else encoding) == (
        ["review", "label"],
        REVIEWS,
    )


def test_gbk_without_characters_of_gb18030(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("Text,Sentiment\n很好,正面\n".encode("gbk"))
    assert read_table(path).rows == [["很好", "正面"]]


def test_latin1_is_not_taken_for_chinese(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("Text,Sentiment\ngood,1\ncafé à la carte,1\n".encode("latin-1"))
    assert "line 3" in (message := refused(path)) and "data.encoding" in message
    assert read_table(path, "latin-1").rows[1] == ["café à la carte", "1"]


def test_broken_utf8_is_not_taken_for_gb18030(tmp_path):
    """Two UTF-8 characters are three of GB18030: without a check, one bad byte turned a whole file into nonsense."""
    path = tmp_path / "x.csv"
    path.write_bytes("Text,Sentiment\n中文,1\n".encode() + b"\xb0\xa1,0\n")
    assert (b"\xb0\xa1" + "中文".encode()).decode("gb18030")
    assert "line 3: broken UTF-8" in refused(path)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16-le", "ascii"])
def test_a_wrong_named_encoding_names_the_line(tmp_path, encoding):
    path = tmp_path / "x.csv"
    bad = b"\x00\xd8" if encoding == "utf-16-le" else b"\xff"
    path.write_bytes("a,b\nc,d\n".encode(encoding) + bad + "\n".encode(encoding))
    assert f"line 3: not {encoding}" in refused(path, encoding)


def test_an_encoding_that_does_not_exist(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="no encoding 'utf-9'"):
        read_table(path, "utf-9")


def test_one_nul_does_not_make_utf16(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\nx\0y,2\n", encoding="utf-8")
    assert read_table(path).rows == [["x\0y", "2"]]


@pytest.mark.parametrize(
    "name, sep", [("comma", ","), ("tab", "\t"), ("semicolon", ";"), ("pipe", "|")]
)
def test_separators_are_found_out(tmp_path, name, sep):
    path = tmp_path / "x.txt"
    others = ",\t;|".replace(sep, "")
    path.write_text(f"Text{sep}Sentiment\nso{others}so{sep}0\n", encoding="utf-8")
    assert (
        read_table(path)
        == read_table(path, "auto", name)
        == (["Text", "Sentiment"], [[f"so{others}so", "0"]])
    )


def test_quotes_between_tabs_are_quotes(tmp_path):
    """SST-2 and MRPC hold lone quotes: with quoting on, all up to the next one is one cell, and rows are lost."""
    path = tmp_path / "x.tsv"
    path.write_text('sentence\tlabel\n"good\t1\nbad\t0\nso" so\t0\n', encoding="utf-8")
    assert [row[0] for row in read_table(path).rows] == ['"good', "bad", 'so" so']
    path.write_text('a\tb\n"1\n2"\t3\n', encoding="utf-8")
    assert "data.quoting" in refused(path)
    assert read_table(path, quoting="true").rows == [["1\n2", "3"]]


def test_cells_are_text_as_written(tmp_path):
    """Type inference makes 5591577e64 of a tweet's id a number, 007 a 7, and NA, None and null nothing."""
    cells = ["5591577e64", "007", "1.0", "NA", "None", "null", "nan", "true", " x "]
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "".join(f"{c},1\n" for c in cells), encoding="utf-8")
    assert [row[0] for row in read_table(path).rows] == cells


def test_a_text_longer_than_the_csv_module_reads(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"a,b\n{'很' * 300_000},1\n", encoding="utf-8")
    assert len(read_table(path).rows[0][0]) == 300_000


def test_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("\n\na,b\n1,2\n\n,\n3,4\n\n", encoding="utf-8")
    assert read_table(path) == (["a", "b"], [["1", "2"], ["3", "4"]])


@pytest.mark.parametrize("row, cells", [("nice, really,1", 3), ("1", 1)])
def test_ragged_rows_are_named(tmp_path, row, cells):
    """pandas cuts the first off after two cells, with a warning, and fills the second up."""
    path = tmp_path / "x.csv"
    path.write_text(f'a,b\n"1\n1",2\n{row}\n', encoding="utf-8")
    assert f"line 4: {cells} cells, the header has 2" in refused(path)


def test_a_quote_that_stays_open_is_named_where_it_opens(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('a,b\n1,2\n"3,4\n5,6\n', encoding="utf-8")
    assert "line 3" in (message := refused(path)) and "data.quoting=false" in message


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "a,b\n", ",,\n,,\n"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_nothing_in_a_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert "empty" in (message := refused(path)) or "no rows" in message


def test_json_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = ['{"Text": "好\\n", "y": 1.0, "z": true}\r', "", '{"y": null, "Text": "half \\ud83d"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_table(path) == (["Text", "y", "z"], [["好\n", "1.0", "true"], ["half ?", "", ""]])
    for bad in ('{"Text": "x"', "[1]", "[" * 100_000):
        path.write_text('{"Text": "x"}\n' + bad, encoding="utf-8")
        assert "line 2" in (message := refused(path)) and "one object a line" in message


def test_packed_files(tmp_path):
    """By their content: a .zip that was renamed is a zip still, and an .xlsx one of several files."""
    path, rows = tmp_path / "x.zip", [["很好", "1"]]
    content = "a\tb\n很好\t1\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._x.tsv", b"\0")
        archive.writestr("inside/x.tsv", content)
    assert read_table(path).rows == rows
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(content))
    assert read_table(tmp_path / "x.tsv.gz").rows == rows
    (tmp_path / "y.jsonl.GZ").write_bytes(
        gzip.compress(json.dumps({"a": "很好", "b": "1"}).encode())
    )
    assert read_table(tmp_path / "y.jsonl.GZ").rows == rows
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.csv", content)
    assert "inside/x.tsv, other.csv" in refused(path)
    path.write_bytes(path.read_bytes()[:50])
    refused(path)
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(content)[:20])
    refused(tmp_path / "x.tsv.gz")


def test_missing_files_and_folders(tmp_path):
    assert "No such file" in refused(tmp_path / "none.csv")
    assert "directory" in refused(tmp_path)


def test_columns(tmp_path):
    path = tmp_path / "x.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["Text ", "label", "Label", "x", "x"], ["a", "b", "c", "d", "e"]]
        )
    table = read_table(path)
    assert column(table, path, "text", "") == ["a"] and column(table, path, "Label", "") == ["c"]
    with pytest.raises(UserError, match="2 columns for the name 'LABEL', 'label' and 'Label'"):
        column(table, path, "LABEL", "")
    with pytest.raises(UserError, match="2 columns for the name 'x'"):
        column(table, path, "x", "")
    with pytest.raises(
        UserError, match="no column 'y'; it has: Text , label, Label, x, x. Set data.text_column"
    ):
        column(table, path, "y", "Set data.text_column")


def test_a_file_without_a_header_does_not_print_its_first_review(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"{'long ' * 500},1\nb,2\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        column(read_table(path), path, "Text", "")
    assert "long long" in str(error.value) and len(str(error.value)) < 300
