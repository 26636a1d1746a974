"""The plain file of all rows: made once, taken again while the input is the same, and never half of it."""

import gzip
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from spmd.formats import spool as module
from spmd.formats.sources import find_sources
from spmd.formats.spool import note_of, remove, sample, spool
from spmd.formats.table_rows import Columns
from tests.support.attempts import small_disk

COLUMNS = Columns(None, {})


@pytest.fixture(autouse=True)
def spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is to lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    return tmp_path / "parts" / "input.jsonl"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | None], None]:
    """Have a pipe with this content as standard input; None: it must not be read."""

    def send(content: bytes | None) -> None:
        reader, writer = os.pipe()
        os.write(writer, content or b"")
        os.close(writer)
        monkeypatch.setattr("spmd.formats.sources.open", lambda *_, **__: os.fdopen(reader, "rb"), raising=False)
        if content is None:
            monkeypatch.setattr(module, "blocks_of", None)

    return send


def test_several_files_are_one_in_order_each_line_ended(spooled: Path) -> None:
    Path("b.jsonl").write_bytes(b'{"b": 1}')
    Path("a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}'))
    Path("empty.jsonl").write_bytes(b"")
    spool(find_sources(["b.jsonl", "empty.jsonl", "a.jsonl.gz"]), spooled, COLUMNS)
    assert spooled.read_bytes() == b'{"b": 1}\n{"a": 1}\n{"a": 2}\n'
    remove(spooled)
    assert not list(spooled.parent.iterdir())


def test_it_is_taken_again_while_the_files_are_the_same_and_else_made_anew(spooled: Path) -> None:
    file = Path("in.gz")
    file.write_bytes(gzip.compress(b"{}\n"))
    spool(find_sources("in.gz"), spooled, COLUMNS)
    made = spooled.stat().st_mtime_ns
    spool(find_sources("./in.gz"), spooled, COLUMNS)
    assert spooled.stat().st_mtime_ns == made
    os.utime(file, ns=(0, 0))
    spool(find_sources("in.gz"), spooled, COLUMNS)
    assert spooled.stat().st_mtime_ns > made
    file.write_bytes(gzip.compress(b"{}\n{}\n"))
    spool(find_sources("in.gz"), spooled, COLUMNS)
    assert spooled.read_bytes() == b"{}\n{}\n"


def test_a_start_that_is_cut_before_the_note_is_there_makes_it_anew(spooled: Path) -> None:
    Path("in.gz").write_bytes(gzip.compress(b"{}\n"))
    spool(find_sources("in.gz"), spooled, COLUMNS)
    for torn in (b"", b'[["'):
        spooled.write_bytes(b"{")
        note_of(spooled).write_bytes(torn)
        spool(find_sources("in.gz"), spooled, COLUMNS)
        assert spooled.read_bytes() == b"{}\n"


def test_a_file_that_breaks_leaves_nothing_that_counts(spooled: Path) -> None:
    Path("a.jsonl").write_bytes(b"{}\n" * 1000)
    Path("b.gz").write_bytes(gzip.compress(os.urandom(10_000))[:-20])
    with pytest.raises(ValueError, match=r"input=b\.gz can't be read: Compressed file ended"):
        spool(find_sources(["a.jsonl", "b.gz"]), spooled, COLUMNS)
    assert not list(spooled.parent.iterdir())


def test_no_row_at_all_is_told(spooled: Path) -> None:
    Path("in.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"input=in\.gz is empty"):
        spool(find_sources("in.gz"), spooled, COLUMNS)


def test_a_full_disk_is_told_with_the_room_it_has(tmp_path: Path) -> None:
    Path("in.gz").write_bytes(gzip.compress(b"{}\n" * 200_000))
    with small_disk(tmp_path / "disk", kib=64) as disk:
        with pytest.raises(
            ValueError, match=r"No space left on device \(.* MiB are free\); it needs room for all rows"
        ):
            spool(find_sources("in.gz"), disk / "input.jsonl", COLUMNS)
        assert not list(disk.iterdir())


def test_a_stream_is_kept_for_starts_that_get_nothing(spooled: Path, sent: Callable[[bytes | None], None]) -> None:
    sent(gzip.compress(b'{"a": 1}\n'))
    spool(find_sources("-"), spooled, COLUMNS)
    sent(b"")
    spool(find_sources("-"), spooled, COLUMNS)
    assert spooled.read_bytes() == b'{"a": 1}\n'
    sent(None)
    spool(find_sources("-"), spooled, COLUMNS, again=True)
    assert spooled.read_bytes() == b'{"a": 1}\n'


def test_a_stream_that_comes_again_replaces_what_was_kept(spooled: Path, sent: Callable[[bytes | None], None]) -> None:
    for content in (b'{"a": 1}\n', b'{"a": 1}\n{"a": 2}'):
        sent(content)
        spool(find_sources("-"), spooled, COLUMNS)
    assert spooled.read_bytes() == b'{"a": 1}\n{"a": 2}\n'


def test_a_job_that_starts_itself_again_takes_no_rest_of_a_stream_for_all_of_it(
    spooled: Path, sent: Callable[[bytes | None], None]
) -> None:
    sent(b'{"a": 2}\n')
    with pytest.raises(ValueError, match="input=- was read by this job's first start, which ended before all of it"):
        spool(find_sources("-"), spooled, COLUMNS, again=True)


def test_an_empty_stream_and_a_terminal_are_told(
    spooled: Path, sent: Callable[[bytes | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent(b"")
    with pytest.raises(ValueError, match="input=- is empty"):
        spool(find_sources("-"), spooled, COLUMNS)
    monkeypatch.setattr("os.isatty", lambda _: True)
    with pytest.raises(ValueError, match="input=- is a terminal: pipe rows into it"):
        spool(find_sources("-"), spooled, COLUMNS)


def test_a_named_pipe_is_read_to_its_end(spooled: Path) -> None:
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(b"{}\n" * 100_000))
    writer.start()
    spool(find_sources("pipe"), spooled, COLUMNS)
    writer.join()
    assert spooled.read_bytes() == b"{}\n" * 100_000


def test_a_sample_is_of_whole_lines(tmp_path: Path) -> None:
    Path("in.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000))
    assert sample(find_sources("in.gz"), COLUMNS, 100) == b'{"a": 1}\n' * 11
    assert sample(find_sources("in.gz"), COLUMNS, 10**6) == b'{"a": 1}\n' * 1000
    assert sample(find_sources("-"), COLUMNS, 100) == b""
