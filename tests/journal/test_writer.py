import json
from pathlib import Path

import pytest

from spmd.journal.locked_file import OpenFile
from spmd.journal.paths import Paths
from spmd.journal.writer import PartWriter
from tests.support.attempts import HEADER, answer, small_disk


def test_an_answer_is_seen_as_soon_as_it_is_written(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    file = Paths.of(output).part(3)
    with PartWriter(output, 3, HEADER) as writer:
        writer.write(7, '{"a": 1}', 0xAB)
        writer.write(8, '{"b": 1}', 0xCD, failed=True)
        writer.write(9, '{"c": 1}')
        header, *lines = file.read_text().splitlines()
        assert json.loads(header) == HEADER
        rows, _, keys, answers = zip(*(line.split("\t") for line in lines), strict=True)
        assert rows == ("7", "8", "9") and answers == ('{"a": 1}', '{"b": 1}', '{"c": 1}')
        assert keys == ("00000000000000ab", "!00000000000000cd", "-")


@pytest.mark.parametrize("noticed", ["at a write", "at the end"])
def test_a_part_that_is_deleted_comes_back(tmp_path: Path, noticed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if noticed == "at a write":
        monkeypatch.setattr("spmd.journal.writer.CHECK_EVERY", 0.0)
    output = str(tmp_path / "out.jsonl")
    file = Paths.of(output).part(0)
    writer = PartWriter(output, 0, HEADER)
    for row in range(20):
        if row % 5 == 3:
            file.unlink()
            file.parent.rmdir()
        writer.write(row, answer(row), row)
        assert file.exists() or noticed == "at the end"
        if row % 5 == 4:
            writer.file.restore()
    file.unlink()
    writer.close()
    assert [int(line.split("\t")[0]) for line in file.read_text().splitlines()[1:]] == list(range(20))


def test_two_do_not_write_one_part(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    with PartWriter(output, 0, HEADER), pytest.raises(ValueError, match=r"part-0.jsonl is written by another run"):
        PartWriter(output, 0, HEADER)
    PartWriter(output, 0, HEADER).close()


def test_a_full_disk_is_reported_and_leaves_whole_lines(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        output = str(disk / "out.jsonl")
        with PartWriter(output, 0, HEADER) as writer:
            with pytest.raises(ValueError) as error:
                for row in range(1000):
                    writer.write(row, answer(row), row)
            for word in (
                "part-0.jsonl can't be written: No space left on device (0.0 of 0.1 MiB are free); the ",
                f" {writer.written:,} answers that it got in this run are safe",
                "start again",
            ):
                assert word in str(error.value)
            assert writer.written > 300
        lines = Paths.of(output).part(0).read_bytes().splitlines(keepends=True)
        assert len(lines) == 1 + writer.written and lines[-1].endswith(b"\n")


def test_a_part_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.parts").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"part-0.jsonl can't be written: File exists"):
        PartWriter(str(tmp_path / "out.jsonl"), 0, HEADER)


def test_a_write_that_fails_is_not_repeated_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a buffered file would, which keeps what it could not flush."""
    output = str(tmp_path / "out.jsonl")
    with PartWriter(output, 0, HEADER) as writer:
        append = OpenFile.append

        def failing(file: OpenFile, data: bytes) -> None:
            monkeypatch.setattr(OpenFile, "append", append)
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(OpenFile, "append", failing)
        with pytest.raises(ValueError, match="Input/output error; the 0 answers"):
            writer.write(0, answer(0), 0)
        writer.write(1, answer(1), 1)
        assert [line.split("\t")[0] for line in Paths.of(output).part(0).read_text().splitlines()[1:]] == ["1"]
