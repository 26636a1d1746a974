"""Whatever form rows come in, the same lines come out; what is cut off or damaged is told, never taken for its end."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from spmd.api.rows import BadRow, Row, load
from spmd.formats import json_array
from spmd.formats.content import blocks_of, is_plain
from spmd.formats.sources import find_sources
from spmd.formats.table_rows import Columns

zstandard = pytest.importorskip("zstandard")
ROWS: list[dict[str, Any]] = [
    {"prompt": f"é\u2028 ☃ 🙂 {number}", "stop": ["]", "}{", '"'], "n": 1} for number in range(50)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    return b"".join(blocks_of(find_sources(str(path))[0], Columns(None, {})))


def rows(lines: bytes) -> list[Any]:
    return [json.loads(line) for line in lines.splitlines()]


def framed(text: bytes) -> bytes:
    """In several frames, the first of which doesn't say its size, as pzstd and streams write them."""
    compressor = zstandard.ZstdCompressor().compressobj()
    first = compressor.compress(text[:1000]) + compressor.flush()
    return bytes(first + zstandard.compress(text[1000:2000]) + zstandard.compress(text[2000:]))


PLAIN = LINES.encode()
COMPRESSED = {
    "gzip": gzip.compress(PLAIN),
    "two members": gzip.compress(PLAIN[:999]) + gzip.compress(PLAIN[999:]),
    "bzip2": bz2.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "zstd": zstandard.compress(PLAIN),
    "frames": framed(PLAIN),
}
ENCODED = {
    "mark": b"\xef\xbb\xbf" + PLAIN,
    "utf-16": LINES.encode("utf-16"),
    "utf-16-le": LINES.encode("utf-16-le"),
    "utf-16-be": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "unmarked": LINES.encode("utf-16-be"),
    "utf-32": LINES.encode("utf-32"),
    "compressed utf-16": gzip.compress(LINES.encode("utf-16")),
}
ARRAYS = {
    "one line": json.dumps(ROWS).encode(),
    "laid out": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "a row a line": b"[" + b",\n".join(PLAIN.splitlines()) + b"]\n",
    "windows": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode(),
    "compressed": gzip.compress(json.dumps(ROWS, indent=2).encode()),
    "utf-16": json.dumps(ROWS, indent=2, ensure_ascii=False).encode("utf-16"),
}


@pytest.mark.parametrize("content", [*COMPRESSED.values(), *ENCODED.values()], ids=[*COMPRESSED, *ENCODED])
def test_compressed_and_encoded_lines_come_out_as_they_were(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path / "in", content).removeprefix(b"\xef\xbb\xbf") == PLAIN
    assert is_plain(*find_sources(str(tmp_path / "in"))) == content.startswith(b"\xef")


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS.keys())
@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_elements_of_an_array_become_lines_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, block: int
) -> None:
    monkeypatch.setattr("spmd.formats.content.BLOCK", block)
    assert rows(read(tmp_path / "in", content)) == ROWS
    assert not is_plain(*find_sources(str(tmp_path / "in")))


def test_an_array_of_anything_is_split_where_its_elements_end() -> None:
    rng = random.Random(0)
    values: list[Any] = [12, -3.5e7, "a,b]", [1, [2]], {}, {"a": [{"b": "}"}]}, None, True, [], '\\"', 0]
    for _ in range(200):
        chosen = rng.choices(values, k=rng.randint(0, 6))
        text = json.dumps(chosen, indent=rng.choice([None, 1])).encode()
        size = rng.randint(1, 9)
        blocks = iter([text[at : at + size] for at in range(0, len(text), size)])
        assert rows(b"".join(json_array.array_lines("x", blocks))) == chosen


def test_what_is_no_text_in_an_array_or_in_utf_16_fails_its_own_row_alone(tmp_path: Path) -> None:
    array = b'[\n{"prompt": "a"},\n{"prompt": "\xff"},\n{"prompt": "b"}]'
    utf_16 = '{"prompt": "a"}\n{"prompt": "\ud800"}\n{"prompt": "b"}\n'.encode("utf-16", "surrogatepass")
    for content in (array, utf_16):
        found = [load(line, number) for number, line in enumerate(read(tmp_path / "in", content).splitlines())]
        assert [type(row) for row in found] == [Row, BadRow, Row]


@pytest.mark.parametrize("content", COMPRESSED.values(), ids=COMPRESSED.keys())
def test_a_compressed_file_that_is_cut_off_anywhere_is_told(tmp_path: Path, content: bytes) -> None:
    for cut in {len(content) - 1, len(content) - 9, len(content) * 3 // 4, len(content) // 2, 20}:
        with pytest.raises(ValueError, match=r"in can't be read: .*if it is cut off or damaged, get it once more"):
            read(tmp_path / "in", content[:cut])


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd"])
def test_a_compressed_file_that_is_damaged_is_told(tmp_path: Path, name: str) -> None:
    content = bytearray(COMPRESSED[name])
    content[len(content) // 2 : len(content) // 2 + 30] = bytes(30)
    with pytest.raises(ValueError, match="in can't be read: "):
        read(tmp_path / "in", bytes(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"a": 1},\n{"a": 2}', "element 2 can't be read: the file ends behind it"),
        (b'[\n{"a": 1},\n', "element 2 can't be read: "),
        (b'[\n{"a": 1},\n]', "element 2 can't be read: "),
        (b'[\n{"a": 1} {"a": 2}]', "element 1 can't be read: '{' stands behind it"),
        (b'[\n{"a": 1},\n{"a": oh}]', "element 2 can't be read: Expecting value"),
        (b'[\n{"a": 1}]\n{"a": 2}', "has '{' behind its JSON array, of 1 elements"),
        (b"[\n" + b"[" * 100_000, "element 1 can't be read: "),
        ('[\n{"a": "é"}]'.encode("utf-16")[:-1], "can't be read: .*truncated"),
    ],
)
def test_an_array_that_breaks_off_is_told_with_the_element(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "in", content)


def test_zstandard_that_nothing_here_reads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(_: object) -> None:
        raise ImportError

    monkeypatch.setattr("spmd.formats.compressed.OPENERS", {b"\x28\xb5\x2f\xfd": lacks})
    with pytest.raises(ValueError, match=r"pip install zstandard, or zstdcat .*in \| launch/local.sh input=-"):
        read(tmp_path / "in", COMPRESSED["zstd"])
