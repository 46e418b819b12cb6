"""Every kind of file that documents lie in, made here by the libraries that users make them with."""

import bz2
import datetime
import gzip
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msa_hf.data import Corpus, DataError

ROWS = [{"key": f"k{number}", "text": f"text é {number}", "n": number} for number in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(path: Path, **options: Any) -> list[Any]:
    """The documents of a source, which are the same however they are read."""
    corpus = Corpus(path, **options)
    rows = list(corpus)
    assert list(corpus.read(0, len(corpus))) == rows
    for first in range(len(rows) - 1, -1, -7):
        assert list(corpus.read(first, min(first + 2, len(rows)))) == rows[first : first + 2]
    return [(row["key"], row["text"], row["metadata"]) for row in rows]


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        Corpus(path, **options)
    assert str(path) in str(error.value)
    return str(error.value)


EXPECTED = [(row["key"], row["text"], {"n": row["n"]}) for row in ROWS]


def zstd(path: Path, data: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "parquet"])
def test_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    else:
        path.write_text(json.dumps(ROWS, indent=1) if suffix == "json" else LINES)
    assert rows_of(path) == EXPECTED


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_tables(tmp_path: Path, suffix: str, mark: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(f'\ufeffkey{mark}text{mark}year\r\na{mark}"one\ntwo ""x"""{mark}1999\r\n\r\nb{mark}é{mark}\r\n')
    assert rows_of(path) == [("a", 'one\ntwo "x"', {"year": "1999"}), ("b", "é", {"year": ""})]
    path.write_text(f"text{mark}key\n{'w' * 300_000}{mark}k\n")  # more than csv takes by itself
    assert len(rows_of(path)[0][1]) == 300_000


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".gz", lambda path, data: path.write_bytes(gzip.compress(data))),
        (".xz", lambda path, data: path.write_bytes(lzma.compress(data))),
        (".bz2", lambda path, data: path.write_bytes(bz2.compress(data))),
        (".zst", zstd),
    ],
)
def test_compressed_files(tmp_path: Path, suffix: str, write: Callable[[Path, bytes], object]) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    write(path, LINES.encode())
    assert rows_of(path) == EXPECTED
    data = path.read_bytes()
    path.write_bytes(data + data)  # several streams in one file
    assert "the key 'k0' is that of" in refused(path)
    for broken in (data[:-9], b"hello", data[: len(data) // 2]):
        path.write_bytes(broken)
        assert "damaged or cut off" in refused(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / f"note.txt{suffix}", b"a note")
    assert rows_of(folder) == [(f"note.txt{suffix}", "a note", {})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"},]', "row 1: not valid JSON"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "row 1: not valid JSON"),
        ("a.json", '[{"text": "a"}', "row 1: not valid JSON"),
        ("a.json", '[{"text": "a', "row 0: not valid JSON"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "is named .jsonl"),
        ("a.json", '"text"', "not a JSON array"),
        ("a.json", "[3]", "row 0: not a JSON object"),
        ("a.json", '[{"text": NaN}]', "row 0: not valid JSON"),
        ("a.json", '[{"text": "\\ud83d"}]', "row 0: 'text' is not Unicode"),
        ("a.csv", "text;key\na;b\n", "separated by ';'"),
        ("a.csv", "text\tkey\na\tb\n", "name it .tsv"),
        ("a.csv", "key,text\na,b,c\n", "line 2: 3 values, but the first line names 2"),
        ("a.csv", "key,text\na\n", "line 2: 1 values"),
        ("a.csv", "text,text\na,b\n", "two columns have the name 'text'"),
        ("a.csv", 'key,text\na,"b\n', "not a table"),
        ("a.csv", "body,key\na,b\n", "line 2: no field 'text' (--text-column); there are: body, key"),
        ("a.csv", "key,text\n", "no documents"),
        ("a.csv", "t\0e\0x\0t\0\n", "zero byte"),
        ("a.parquet", "PAR1", "not a parquet file"),
    ],
)
def test_mistakes_in_rows_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    assert message in refused(tmp_path / name)


def test_tables_of_other_encodings_are_named_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("key,text\na,b\nc,é\n", encoding="latin-1")
    assert "line 3: not UTF-8 text (byte 0xe9 at 2)" in refused(path)
    assert rows_of(path, encoding="latin-1")[1][1] == "é"
    path.write_text("key,text\na,é\n", encoding="utf-16")
    assert "--encoding utf-16" in refused(path)
    assert rows_of(path, encoding="utf-16") == [("a", "é", {})]


def test_long_arrays_are_not_held_in_memory(tmp_path: Path) -> None:
    """Items longer than what is read at a time, and many in one such piece."""
    sizes = [1, 3_000_000, *range(2000), 600_000]
    rows = [{"text": "x" * size + "y"} for size in sizes]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert list(Corpus(tmp_path / "a.json").sizes) == [size + 1 for size in sizes]


def test_dates_and_gaps_of_parquet(tmp_path: Path) -> None:
    table = {
        "text": ["a", "b"],
        "day": [datetime.date(2020, 1, 2), None],
        "at": [datetime.datetime(2020, 1, 2, 3), None],
        "list": [[1], []],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    wanted = {"day": "2020-01-02", "at": "2020-01-02T03:00:00", "list": [1]}
    assert [row[2] for row in rows_of(tmp_path / "a.parquet")] == [wanted, {"day": None, "at": None, "list": []}]
    pq.write_table(pa.table({"text": ["a"], "x": [float("nan")]}), tmp_path / "a.parquet")
    assert "row 0: its metadata cannot be written as JSON: 'x' is nan" in refused(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "image": [b"\x89PNG"]}), tmp_path / "a.parquet")
    assert "'image' is an object of type bytes" in refused(tmp_path / "a.parquet")


PAGE = """<!doctype html><html><head><title>Tea &amp; Co</title><style>p {}</style></head><body><!-- hidden -->
<h1>Tea</h1><p>Grown in <b>Ass</b>am,
and cold<br>hills.</p><script>alert(1)</script><ul><li>green<li>black</ul><pre>  kept
    as it is</pre><table><tr><td>1</td><td>2</td></tr></table></body></html>"""


def test_pages(tmp_path: Path) -> None:
    path = tmp_path / "tea.html"
    path.write_text(PAGE)
    ((key, text, metadata),) = rows_of(path)
    assert (key, metadata) == ("tea.html", {"title": "Tea & Co"})
    lines = [line for line in text.splitlines() if line]
    assert lines[:3] == ["Tea", "Grown in Assam, and cold", "hills."] and lines[3:5] == ["green", "black"]
    assert lines[5:] == ["  kept", "    as it is", "1\t2"]
    path.write_bytes('<meta charset="iso-8859-1"><p>café'.encode("latin-1"))
    assert rows_of(path)[0][1] == "café"
    path.write_bytes("<p>café".encode("latin-1"))
    assert "--encoding latin-1" in refused(path) and rows_of(path, encoding="latin-1")[0][1] == "café"
    path.write_text('<meta charset="klingon"><p>a')
    assert "klingon" in refused(path)
    path.write_text("<div>" * 5000 + "deep")
    assert rows_of(path)[0][1] == "deep"


def write_epub(path: Path) -> None:
    opf = (
        '<package xmlns="http://www.idpf.org/2007/opf"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        '<dc:title>Two chapters</dc:title></metadata><manifest><item id="b" href="b%20x.xhtml"/>'
        '<item id="a" href="a.xhtml"/></manifest><spine><itemref idref="a"/><itemref idref="b"/></spine></package>'
    )
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="in/c.opf"/></rootfiles></container>'
    )
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("META-INF/container.xml", container)
        book.writestr("in/c.opf", opf)
        book.writestr("in/a.xhtml", '<?xml version="1.0" encoding="utf-8"?><html><body><p>First é</p></body></html>')
        book.writestr("in/b x.xhtml", "<html><body><p>Second</p></body></html>")


def write_pdf(path: Path, text: str) -> None:
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 5 0 R>>>>/Contents 4 0 R>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj%sendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(data)
    path.write_bytes(data + b"xref\n0 6\n0000000000 65535 f \n" + table + end)


def write_docx(path: Path) -> None:
    import docx

    document = docx.Document()
    document.add_heading("Towers")
    document.add_paragraph("The old one")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "built", "1889"
    document.add_paragraph("and the new one")
    document.save(str(path))


def write_pptx(path: Path) -> None:
    import pptx

    slides = pptx.Presentation()
    for title in ("One", "Two"):
        slide = slides.slides.add_slide(slides.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = title, "a point"
        slide.notes_slide.notes_text_frame.text = "a note"
    slides.save(str(path))


def write_xlsx(path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Towers"
    for row in (["name", "built", None], [], ["old", 1889.0, True], ["new\none", 2.5, "=1+1"]):
        sheet.append(row)
    sheet["E5"], sheet["F5"] = datetime.datetime(2020, 1, 2), datetime.time(7, 30)
    book.create_sheet("Nothing")
    book.create_sheet("Teas").append(["Assam"])
    book.save(path)


def write_odt(path: Path, body: str = "", manifest: str = "<manifest/>") -> None:
    names = " ".join(
        f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "text", "table", "drawing")
    )
    body = body or (
        "<office:text><text:tracked-changes><text:p>deleted</text:p></text:tracked-changes>"
        "<text:h>The <text:span>old</text:span>\n   tower</text:h><text:section><text:list><text:list-item>"
        '<text:p>one<text:s text:c="3"/>two<text:tab/>three<text:line-break/>four</text:p></text:list-item></text:list>'
        "</text:section><text:p>Noted<text:note><text:note-citation>1</text:note-citation><text:note-body>"
        "<text:p>the note</text:p></text:note-body></text:note> here<office:annotation><text:p>a comment</text:p>"
        "</office:annotation>.</text:p><table:table><table:table-row><table:table-cell><text:p>built</text:p>"
        "</table:table-cell><table:table-cell><text:p>1889</text:p></table:table-cell></table:table-row></table:table>"
        "<text:p>a<text:a>nd the</text:a> end</text:p></office:text>"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/manifest.xml", manifest)
        archive.writestr("content.xml", f"<document {names}><office:body>{body}</office:body></document>")
        title = '<m xmlns:dc="http://purl.org/dc/elements/1.1/"><a><dc:title>Towers</dc:title></a></m>'
        archive.writestr("meta.xml", title)


@pytest.mark.parametrize(
    ("suffix", "write", "text", "metadata"),
    [
        (
            "xlsx",
            write_xlsx,
            "Towers\nname\tbuilt\nold\t1889\tTrue\nnew one\t2.5\n\t\t\t\t2020-01-02\t07:30:00\n\nTeas\nAssam",
            {},
        ),
        (
            "odt",
            write_odt,
            "The old tower\none   two\tthree\nfour\nNoted here.\nthe note\nbuilt\t1889\nand the end",
            {"title": "Towers"},
        ),
        ("pdf", lambda path: write_pdf(path, "The tower was built"), "The tower was built", {}),
        ("docx", write_docx, "Towers\nThe old one\nbuilt\t1889\nand the new one", {}),
        ("pptx", write_pptx, "One\na point\na note\n\nTwo\na point\na note", {}),
        ("epub", write_epub, "First é\n\nSecond", {"title": "Two chapters"}),
    ],
    ids=["xlsx", "odt", "pdf", "docx", "pptx", "epub"],
)
def test_books_and_office(
    tmp_path: Path, suffix: str, write: Callable[[Path], None], text: str, metadata: dict[str, Any]
) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path)
    assert rows_of(path) == [(f"a.{suffix}", text, metadata)]
    data = path.read_bytes()
    for broken in (b"nothing of the kind", data[: len(data) // 2]):
        path.write_bytes(broken)
        assert "cannot read it" in refused(path)


@pytest.mark.parametrize("suffix", ["docx", "pptx", "xlsx", "odt", "epub"])
def test_older_formats_and_passwords_are_named(tmp_path: Path, suffix: str) -> None:
    """Both are files of an older kind, in which others lie."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(bytes.fromhex("d0cf11e0a1b11ae1") + bytes(512))
    assert "locked with a password, or of the format" in refused(path)


def test_other_open_documents_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.odt"
    write_odt(path, "<office:spreadsheet/>")
    assert "another kind of document" in refused(path)
    write_odt(path, manifest="<manifest><encryption-data/></manifest>")
    assert "locked with a password" in refused(path)
    write_odt(path, "<office:text>" + "<text:section>" * 5000 + "</text:section>" * 5000 + "</office:text>")
    assert "cannot read it" in refused(path)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("version", [3, 4])
def test_notebooks(tmp_path: Path, version: int, whole: bool) -> None:
    def kept(text: str) -> str | list[str]:
        return text if whole else text.splitlines(keepends=True)

    word = "input" if version == 3 else "source"
    pages = {"text/plain": kept("'1889'"), "text/html": "<b>", "image/png": "iVBO"}
    shown: dict[str, Any] = {"text": kept("'1889'"), "png": "iVBO"} if version == 3 else {"data": pages}
    cells = [
        {"cell_type": "markdown", "source": kept("# Towers\n\nAll of them.")},
        {
            "cell_type": "code",
            word: kept("print(1)\nyear"),
            "outputs": [
                {"output_type": "stream", "text": kept("1\n")},
                {"output_type": "execute_result", **shown},
                {"output_type": "error", "ename": "NameError", "traceback": ["..."]},
            ],
        },
        {"cell_type": "raw", "source": []},
    ]
    notebook = {"worksheets": [{"cells": cells}]} if version == 3 else {"cells": cells, "nbformat": 4}
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(notebook))
    text = "# Towers\n\nAll of them.\n\nprint(1)\nyear\n\n1\n\n'1889'"
    assert rows_of(path) == [("a.ipynb", text, {})]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", "3", '{"cells": 3}', '{"cells": [{}]}', '{"cells": [{"source": 1}]}', "[" * 100_000]
)
def test_what_is_no_notebook(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.ipynb").write_text(text)
    assert "not a notebook" in refused(tmp_path / "a.ipynb")


def test_empty_files_of_any_kind_are_left_out_of_folders(tmp_path: Path) -> None:
    names = ["a.csv", "a.docx", "a.ipynb", "a.json", "a.jsonl", "a.odt", "a.parquet", "a.pdf", "a.txt", "a.jsonl.gz"]
    for name in names:
        (tmp_path / name).touch()
        assert "nothing in it" in refused(tmp_path / name)
    (tmp_path / "b.txt").write_text("b")
    corpus = Corpus(tmp_path)
    assert [row["key"] for row in corpus] == ["b.txt"]
    assert {(item.place, item.bad) for item in corpus.skipped} == {(name, False) for name in names}


def test_what_has_no_text_or_is_locked(tmp_path: Path) -> None:
    import pypdf

    write_pdf(tmp_path / "a.pdf", "The tower")
    write_pdf(tmp_path / "images.pdf", "")
    for name, password in (("locked.pdf", "secret"), ("open.pdf", "")):
        writer = pypdf.PdfWriter(clone_from=tmp_path / "a.pdf")
        writer.encrypt(password, "owner", algorithm="RC4-128")
        writer.write(tmp_path / name)
    assert rows_of(tmp_path / "open.pdf")[0][1] == "The tower"
    assert "locked with a password" in refused(tmp_path / "locked.pdf")
    assert "pages that are images have none" in refused(tmp_path / "images.pdf")
    corpus = Corpus(tmp_path, skip_bad=True)
    assert [row["key"] for row in corpus] == ["a.pdf", "open.pdf"]
    assert {(item.place.split("/")[-1], item.bad) for item in corpus.skipped} == {
        ("images.pdf", False),
        ("locked.pdf", True),
    }


def test_an_archive_that_grows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msa_hf.data.files.libraries.LONGEST", 2**20)
    with zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"word/{number}.xml", b" " * 2**19)
    assert "MiB of text" in refused(tmp_path / "a.docx")


def test_a_missing_library_is_no_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants all pdfs of a folder left out because a package is not there."""
    write_pdf(tmp_path / "a.pdf", "x")
    (tmp_path / "b.txt").write_text("b")
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    with pytest.raises(ImportError, match=r"a\.pdf: .*pip install 'msa-hf\[files\]'.*--glob"):
        Corpus(tmp_path, skip_bad=True)
    assert rows_of(tmp_path, glob="*.txt") == [("b.txt", "b", {})]
