"""What `input` may name: files, patterns, lists, streams; and what is told where it names nothing."""

import os
from pathlib import Path

import pytest

from spmd.formats.sources import find_sources


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", "deep/d.jsonl", "e[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        (["b.jsonl", "a.jsonl"], ["b.jsonl", "a.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        (["c*", "a*"], ["c.jsonl.gz", "a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/d.jsonl", "e[1].jsonl"]),
        ("e[1].jsonl", ["e[1].jsonl"]),
        ("-", ["-"]),
        ("/dev/stdin", ["-"]),
    ],
)
def test_files_patterns_and_lists_are_found_in_order(given: str | list[str], paths: list[str]) -> None:
    assert [source.path for source in find_sources(given)] == paths


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.jsonl", "input=none.jsonl can't be read: No such file or directory"),
        ("a.jsonl,b.jsonl", r"several files are written as input=\[a.jsonl,b.jsonl\]"),
        ("/dev/fd/99", "only standard input reaches the ranks: pipe rows into it"),
        ("x*.jsonl", r"input=x\*.jsonl is the name of no file, and as a pattern fits none"),
        ("deep", "input=deep is a directory; its files are meant by a pattern, as in input='deep/\\*.jsonl'"),
        (["a.jsonl", "./a.jsonl"], "input names ./a.jsonl twice"),
        (["a.jsonl", "-"], "input: - is no file and must stand alone, not among 2 inputs"),
        ([], r"input=\[\] names no file"),
        ("/dev/null", "is a terminal or device"),
    ],
)
def test_what_names_nothing_that_can_be_read_is_told(given: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_sources(given)


def test_a_pipe_is_a_stream(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (source,) = find_sources("pipe")
    assert source.streamed
