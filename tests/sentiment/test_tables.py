"""Tables of strangers, as they come, and one clear sentence for broken ones."""

import csv
import gzip
import io
import json
import sys
import zipfile

import pytest

from smallgpt import parquet
from smallgpt.console import UserError
from smallgpt.sentiment import tables
from smallgpt.sentiment.tables import Table, read_table

REVIEWS = [
    ["房间很干净，服务也好", "1"],
    ['太吵了, "绝不"再来', "0"],
    ["早餐\n一般", "0"],
    ["😀", "1"],
]


TEXT = 'review,label\n房间很干净，服务也好,1\n"太吵了, ""绝不""再来",0\n"早餐\n一般",0\n😀,1\n'


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    return table.header, table.rows


def refused(path, *args, **options) -> str:
    with pytest.raises(UserError) as error:
        read_table(path, *args, **options)
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
    found = read_table(path)
    assert cells(found) == (["review", "label"], REVIEWS)
    certain = encoding in ("utf-8", "utf-8-sig", "utf-16")
    assert found.notes == ([] if certain else [f"x.csv: guessed data.encoding={encoding}"])
    named = read_table(path, "utf-8" if encoding == "utf-8-sig" else encoding)
    assert cells(named) == (["review", "label"], REVIEWS) and named.notes == []


def test_gbk_without_characters_of_gb18030(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("Text,Sentiment\n很好,正面\n".encode("gbk"))
    assert read_table(path).rows == [["很好", "正面"]]


JAPANESE = (
    "この部屋はとても静かで、朝食も美味しかったです。店員の対応が悪くて残念でした。"
    "また泊まりたいと思います。"
)
KOREAN = (
    "이 방은 아주 조용하고 아침 식사도 맛있었습니다. 직원의 태도가 나빠서 실망했어요. "
    "영화는 재미있었지만 너무 길어요."
)
TRADITIONAL = (
    "這個房間非常安靜，早餐也很好吃，下次還會再來。服務態度很差，讓人失望。電影很好看，但是太長了。"
)
FOREIGN = {"shift_jis": JAPANESE, "euc-jp": JAPANESE, "euc-kr": KOREAN, "big5": TRADITIONAL}


@pytest.mark.parametrize("encoding", FOREIGN)
def test_other_encodings_of_east_asia_are_not_taken_for_chinese(tmp_path, encoding):
    """Regression: Shift-JIS means something in GB18030, too, and sets were read as nonsense."""
    path = tmp_path / "x.csv"
    text = FOREIGN[encoding]
    content = f"Text,Sentiment\n{text},1\n".encode(encoding)
    assert content.decode("gb18030")
    path.write_bytes(content)
    message = refused(path)
    assert "line 2: neither UTF-8 nor GB18030" in message and "data.encoding, such as" in message
    assert encoding in message and "latin-1" not in message
    assert read_table(path, encoding).rows == [[text, "1"]]


def test_short_and_traditional_chinese_is_read_as_gb18030(tmp_path):
    path = tmp_path / "x.csv"
    for text in ("很好", "房间很安静", TRADITIONAL, "good 酒店, 一般 😀", "１０分"):
        path.write_bytes(f"Text;Sentiment\n{text};1\n".encode("gb18030"))
        assert read_table(path).rows == [[text, "1"]]


def test_latin1_is_not_taken_for_chinese(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("Text,Sentiment\ngood,1\ncafé à la carte,1\n".encode("latin-1"))
    message = refused(path)
    assert "line 3" in message and message.endswith("data.encoding, such as cp1252")
    assert read_table(path, "cp1252").rows[1] == ["café à la carte", "1"]
    path.write_bytes("Text,Sentiment\nnaïve naïve naïve,1\n".encode("latin-1"))
    assert "cp1252" in refused(path)


def test_broken_utf8_is_not_taken_for_gb18030(tmp_path):
    """Two UTF-8 characters are three of GB18030: one bad byte would turn a file into nonsense."""
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


@pytest.mark.parametrize("name", ["utf-9", "hex", "undefined"])
def test_names_of_no_text_encoding(tmp_path, name):
    """Regression: Python knows encodings of something else, whose errors were tracebacks."""
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1..2,2\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"no encoding '{name}'"):
        read_table(path, name)


@pytest.mark.parametrize("text", ["x\0y", "aa\0b\0c", "aaa\0b\0c", "\0\0", "一\0", "\0a\0b\0c\0d"])
def test_zero_bytes_do_not_make_utf16(tmp_path, text):
    """Regression: "not utf-16-le" of a file with two zero bytes; now their line is named."""
    path = tmp_path / "x.csv"
    path.write_text(f"a,b\n{text},2\n" + "good,1\n" * 20, encoding="utf-8")
    found = read_table(path)
    assert found.rows[0] == [text, "2"]
    assert found.notes == ["x.csv, line 2: a NUL character, kept as part of the text"]
    path.write_bytes(f"a,b\nc,d\n{text},é\n".encode("latin-1", "replace"))
    assert "line 3: a NUL byte" in refused(path)


def test_utf16_without_a_mark_and_with_few_separators(tmp_path):
    """Regression: 一 has a zero byte where separators have none, and hid them."""
    path = tmp_path / "x.csv"
    for encoding in ("utf-16-le", "utf-16-be"):
        path.write_bytes(f"文,标\n{'一二三上下' * 300},1\n".encode(encoding))
        assert read_table(path).rows == [["一二三上下" * 300, "1"]]
        path.write_bytes(b"a,b\n" + path.read_bytes()[1:])
        refused(path)


@pytest.mark.parametrize(
    "name, sep", [("comma", ","), ("tab", "\t"), ("semicolon", ";"), ("pipe", "|")]
)
def test_separators_are_found_out(tmp_path, name, sep):
    path = tmp_path / "x.txt"
    others = ",\t;|".replace(sep, "")
    path.write_text(f"Text{sep}Sentiment\nso{others}so{sep}0\n", encoding="utf-8")
    expected = (["Text", "Sentiment"], [[f"so{others}so", "0"]])
    assert cells(read_table(path)) == cells(read_table(path, "auto", name)) == expected
    guessed = [] if name == "comma" else [f"x.txt: guessed data.separator={name}"]
    assert read_table(path).notes == guessed and read_table(path, "auto", name).notes == []


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("sign", [";", ",", "\t", "|", "^", "~"])
def test_the_separator_that_excel_names_is_obeyed(tmp_path, newline, sign):
    """Regression: the line `sep=;` was taken for the header, whatever separator was set."""
    path = tmp_path / "x.csv"
    others = ";,|".replace(sign, "")
    lines = [f"sep={sign}", f"Text{sign}Sentiment", f"so{others}so{sign}0", f"x{sign}1{sign}"]
    path.write_text(newline.join(lines[:3]) + newline, encoding="utf-8", newline="")
    expected = (["Text", "Sentiment"], [[f"so{others}so", "0"]])
    assert cells(read_table(path)) == expected and read_table(path).notes == []
    name = next((name for name, s in tables.SEPARATORS.items() if s == sign), "auto")
    assert cells(read_table(path, separator=name)) == expected
    path.write_text(newline.join(lines), encoding="utf-8", newline="")
    assert "line 4: 3 cells, the first line has 2" in refused(path)
    path.write_text("sep=;\n", encoding="utf-8")
    assert "no rows" in refused(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "title", ["Text, of, review", "a\tb\tc", "a|b|c,d,e", "Text,\nof, it", 'a "b, c,']
)
def test_separators_inside_quotes_do_not_count(tmp_path, newline, title):
    """Regression: a title with commas made a file of semicolons unreadable, whatever was set."""
    path = tmp_path / "x.csv"
    quoted = title.replace('"', '""')
    lines = [f'"{quoted}";"Sentiment"', '"good, really";1', '"a, b, c";0']
    path.write_text("\n".join(lines).replace("\n", newline), encoding="utf-8", newline="")
    expected = ([title, "Sentiment"], [["good, really", "1"], ["a, b, c", "0"]])
    assert cells(read_table(path)) == expected
    assert cells(read_table(path, separator="semicolon")) == expected


def test_a_separator_that_all_lines_hold(tmp_path):
    """A header with two signs: the one that the rows hold as often is the separator."""
    path = tmp_path / "x.csv"
    path.write_text("Text;Score, from 1, to 5\ngood;1\nbad, really;0\n", encoding="utf-8")
    assert cells(read_table(path))[1] == [["good", "1"], ["bad, really", "0"]]


def test_a_file_without_a_header(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('"0","good, really"\n"4","bad"\n', encoding="utf-8")
    table = read_table(path, header=False)
    assert cells(table) == (["1", "2"], [["0", "good, really"], ["4", "bad"]])
    assert table.column("2", "") == ["good, really", "bad"]
    path.write_text("one,1\n", encoding="utf-8")
    assert read_table(path, header=False).rows == [["one", "1"]]
    path.write_text("one,1\ntwo\n", encoding="utf-8")
    assert "line 2: 1 cells, the first line has 2" in refused(path, header=False)
    path.write_text(",,\n,,\n", encoding="utf-8")
    refused(path, header=False)
    path.write_text('{"Text": "a"}\n', encoding="utf-8")
    assert "names its columns: leave out data.header=false" in refused(path, header=False)


@pytest.mark.parametrize(
    "line, guess",
    [
        ("{label}\t{text}", ("2", "", "1")),
        ("{text}\t{label}", ("1", "", "2")),
        ("{label}\t{text}\tother {text}", ("2", "3", "1")),
        ("{text}\tother {text}\t{label}", ("1", "2", "3")),
        ("{text}", None),
        ("{label}\t{text}\t7\t{text}", None),
    ],
)
def test_columns_without_a_header_are_guessed(tmp_path, line, guess):
    """Labels repeat, and texts do not: the label must not be taken for a text."""
    path = tmp_path / "x.tsv"
    rows = [line.format(label=i % 2, text=f'text" {i}') for i in range(9)]
    path.write_text("\n".join(rows), encoding="utf-8")
    table = read_table(path, header=False)
    assert table.guess == guess and len(table.rows) == 9
    assert read_table(path).guess is None


@pytest.mark.parametrize("cell", ['\\"hi\\", he said', 'x \\"y\\"', '\\"', 'a, \\"b\\"'])
def test_backslashes_before_quotes(tmp_path, cell):
    """Regression: "correct its quotes", and no way to say that a backslash escapes them."""
    path, text = tmp_path / "x.csv", cell.replace("\\", "")
    rows = "".join(f'"{cell} {i}",{i % 2}\n' for i in range(5))
    path.write_text(f"a,b\n{rows}", encoding="utf-8")
    expected = [[f"{text} {i}", str(i % 2)] for i in range(5)]
    assert read_table(path).rows == read_table(path, escape="backslash").rows == expected
    assert read_table(path).notes == ["x.csv: guessed data.escape=backslash"]
    assert read_table(path, escape="backslash").notes == []
    assert "line 2" in refused(path, escape="none")


def test_backslashes_that_are_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('a,b\n"C:\\new \\o/",1\n\\"x,2\n', encoding="utf-8")
    found = read_table(path)
    assert found.rows == [["C:\\new \\o/", "1"], ['\\"x', "2"]] and found.notes == []


def test_spaces_before_quotes(tmp_path):
    """Regression: `a, "neg"` gave a label with quotes, and `a, "b, c"` three cells."""
    path = tmp_path / "x.csv"
    path.write_text('Text, Sentiment\n x , "neg"\n"y, z",  "a, ""b"""\n', encoding="utf-8")
    found = read_table(path)
    assert found.rows == [["x ", "neg"], ["y, z", 'a, "b"']]
    assert found.notes == ["x.csv: left out the spaces before quotes"]
    kept = read_table(path.parent / path.name, quoting="true")
    assert kept.rows == found.rows
    path.write_text('a,b\n1, "hello" she said\n', encoding="utf-8")
    assert read_table(path).rows == [["1", ' "hello" she said']] and read_table(path).notes == []
    path.write_text('a,b\n1, "hello" she said\n2, "neg"\n', encoding="utf-8")
    assert "line 3: a space stands before the quote of" in refused(path)
    assert read_table(path, quoting="false").rows[1] == ["2", ' "neg"']


def test_quotes_that_enclose_cells_between_tabs(tmp_path):
    """Regression: texts came out as `"a ""b"" c"`: between tabs, quotes are mostly text."""
    path = tmp_path / "x.tsv"
    for content, rows in (
        ('Text\ty\n"a ""b"" c"\tneg\nplain\tpos\n', [['a "b" c', "neg"], ["plain", "pos"]]),
        ('"Text"\t"y"\n"a"\t"neg"\n"b"\t"pos"\n', [["a", "neg"], ["b", "pos"]]),
        ('Text\ty\n"a ""b"" c"\t "neg"\n', [['a "b" c', "neg"]]),
    ):
        path.write_text(content, encoding="utf-8")
        found = read_table(path)
        assert found.rows == rows and found.notes[0].startswith("x.tsv: guessed data.quoting=true")
    path.write_text('Text\ty\n"a"\tneg\nb\tpos\n', encoding="utf-8")  # a title in quotes
    assert read_table(path).rows[0] == ['"a"', "neg"] and read_table(path).notes == []


def test_quotes_between_tabs_are_quotes(tmp_path):
    """SST-2 and MRPC hold lone quotes: with quoting on, all up to the next one is one cell."""
    path = tmp_path / "x.tsv"
    path.write_text('sentence\tlabel\n"good\t1\nbad\t0\nso" so\t0\n', encoding="utf-8")
    assert [row[0] for row in read_table(path).rows] == ['"good', "bad", 'so" so']
    path.write_text('a\tb\n"1\n2"\t3\n', encoding="utf-8")
    assert "data.quoting" in refused(path)
    assert read_table(path, quoting="true").rows == [["1\n2", "3"]]


def test_cells_are_text_as_written(tmp_path):
    """Type inference makes a number of a tweet's id 5591577e64, of 007 a 7, of NA nothing."""
    written = ["5591577e64", "007", "1.0", "NA", "None", "null", "nan", "true", " x "]
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "".join(f"{c},1\n" for c in written), encoding="utf-8")
    assert [row[0] for row in read_table(path).rows] == written


def test_a_text_longer_than_the_csv_module_reads(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"a,b\n{'很' * 300_000},1\n", encoding="utf-8")
    assert len(read_table(path).rows[0][0]) == 300_000


def test_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("\n\na,b\n1,2\n\n,\n3,4\n\n", encoding="utf-8")
    assert cells(read_table(path)) == (["a", "b"], [["1", "2"], ["3", "4"]])


@pytest.mark.parametrize("row, count", [("nice, really,1", 3), ("1", 1)])
def test_ragged_rows_are_named(tmp_path, row, count):
    """pandas cuts the first off after two cells, with a warning, and fills the second up."""
    path = tmp_path / "x.csv"
    path.write_text(f'a,b\n"1\n1",2\n{row}\n', encoding="utf-8")
    assert f"line 4: {count} cells, the first line has 2" in refused(path)


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
    expected = [["好\n", "1.0", "true"], ["half ?", "", ""]]
    assert cells(read_table(path)) == (["Text", "y", "z"], expected)
    for bad in ('{"Text": "x"', "[1]", "[" * 100_000):
        path.write_text('{"Text": "x"}\n' + bad, encoding="utf-8")
        assert "line 2" in (message := refused(path)) and "one object a line" in message


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x"])
@pytest.mark.parametrize("layout", ["lines", "list", "indented list"])
def test_json_is_known_by_its_beginning(tmp_path, name, layout):
    objects = [{"Text": "很, 好", "y": 1}, {"Text": "b", "y": 0}]
    content = "\n".join(json.dumps(o) for o in objects)
    if "list" in layout:
        content = json.dumps(objects, indent=2 if "indented" in layout else None)
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert cells(read_table(path)) == (["Text", "y"], [["很, 好", "1"], ["b", "0"]])
    path.write_text("[{" + content, encoding="utf-8")
    assert "not JSON" in refused(path)
    path.write_text(json.dumps([objects[0], 7]), encoding="utf-8")
    assert "item 2: not an object" in refused(path)


@pytest.mark.parametrize(
    "value, what", [(["neg"], "a list"), ([], "a list"), ({"a": 1}, "an object")]
)
def test_lists_are_no_labels(tmp_path, value, what):
    """Regression: labels such as `["neg"]`. Columns that are not used may hold lists."""
    path = tmp_path / "x.jsonl"
    rows = [{"Text": "a", "y": "1"}, {"Text": "b", "y": value}, {"Text": "c", "y": value}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    table = read_table(path)
    assert table.column("Text", "") == ["a", "b", "c"]
    with pytest.raises(
        UserError, match=f"x.jsonl, line 2: the column 'y' holds {what}; write a text"
    ):
        table.column("y", "")


PARQUET = {
    "Text": ["很, 好", "b", None],
    "y": [1, 0, None],
    "score": [1.0, 0.5, None],
    "flag": [True, False, None],
    "tokens": [["b"], [], None],
}


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.jsonl", "x.parquet.gz", "x.zip"])
def test_parquet(tmp_path, name):
    """By its first bytes, whatever its name; it was "not utf-16-be"."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    buffer = io.BytesIO()
    write_table(pyarrow.table(PARQUET), buffer)
    path, content = tmp_path / name, buffer.getvalue()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.parquet", content)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    table = read_table(path)
    assert table.header == list(PARQUET) and len(table.rows) == 3
    columns = [table.column(title, "") for title in ("Text", "y", "score", "flag")]
    assert columns == [
        ["很, 好", "b", ""],
        ["1", "0", ""],
        ["1.0", "0.5", ""],
        ["true", "false", ""],
    ]
    with pytest.raises(UserError, match="row 1: the column 'tokens' holds a list"):
        table.column("tokens", "")


def test_parquet_is_read_in_batches(tmp_path, monkeypatch):
    """A file that holds more than the memory, most of it in other columns, must not be read whole
    before its first row."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "x.parquet"
    images = [{"bytes": b"\xff" * 99} for _ in range(10)]
    write_table(pyarrow.table({"Text": [str(i) for i in range(10)], "image": images}), path)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 3)
    monkeypatch.setattr(tables, "unpack", None)
    table = read_table(path)
    assert table.rows == [[str(i), ""] for i in range(10)]
    with pytest.raises(UserError, match="row 1: the column 'image' holds an object; write a text"):
        table.column("image", "")


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_bytes(b"PAR1\x15" + bytes(range(256)) * 20 + b"PAR1")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        assert "is a Parquet file, which pyarrow reads: pip install pyarrow" in refused(path)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    assert "is a damaged Parquet file (" in refused(path)
    write_table(pyarrow.table({"a": ["x"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "is a damaged Parquet file (" in refused(path)
    write_table(pyarrow.table({"a": pyarrow.array([], "string")}), path)
    assert "has no rows" in refused(path)


@pytest.mark.parametrize(
    "magic, what",
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an Office document: save its table as CSV"),
        (b"%PDF-1.7\n", "a PDF document: save its table as CSV"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
        (b"Rar!\x1a\x07", "a rar archive: unpack it"),
        (b"BZh91AY", "compressed with bzip2: unpack it"),
        (b"\xfd7zXZ\0", "compressed with xz: unpack it"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it"),
    ],
)
def test_other_formats_are_named(tmp_path, magic, what):
    path = tmp_path / "x.csv"
    path.write_bytes(magic + bytes(range(256)) * 4)
    assert f"is {what}" in refused(path)


@pytest.mark.parametrize("inside", ["xl/workbook.xml", "content.xml"])
def test_spreadsheets_are_named(tmp_path, inside):
    path = tmp_path / "book.csv"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "x")
        archive.writestr(inside, "<x/>")
    assert "is a spreadsheet: save the sheet as CSV" in refused(path)


def test_packed_files(tmp_path):
    """By their content: a .zip that was renamed is a zip still."""
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
    assert table.column("text", "") == ["a"] and table.column("Label", "") == ["c"]
    with pytest.raises(UserError, match="2 columns for the name 'LABEL', 'label' and 'Label'"):
        table.column("LABEL", "")
    with pytest.raises(UserError, match="2 columns for the name 'x'"):
        table.column("x", "")
    with pytest.raises(
        UserError, match="no column 'y'; it has: Text , label, Label, x, x. Set data.text_column"
    ):
        table.column("y", "Set data.text_column")


def test_a_file_without_a_header_does_not_print_its_first_review(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"{'long ' * 500},1\nb,2\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_table(path).column("Text", "")
    assert "long long" in str(error.value) and len(str(error.value)) < 300
