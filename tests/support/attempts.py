"""Runs that only pretend to answer: the files of an output go through all they go through in a real one."""

import json
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from spmd.journal.journal import Journal
from spmd.journal.key_table import KeyTable
from spmd.journal.writer import PartWriter

HEADER: dict[str, Any] = {"identity": {"weights": "a", "sampling.seed": 0}, "model.path": "/models/a", "job": None}


def answer(key: int, failed: bool = False) -> str:
    """What a row of this key gets, with characters that a file format could stumble over."""
    return json.dumps({"row": key, "error": failed, "text": "é\t\r\n\0 " * (key % 4)}, ensure_ascii=False)


def attempt(
    output: str | Path,
    rows: Sequence[int],
    resume: str = "auto",
    dp: int = 1,
    cut: int | None = None,
    by_time: bool = False,
    failing: Collection[int] = (),
    header: dict[str, Any] = HEADER,
    again: bool = False,
) -> list[int]:
    """One run over an input whose rows have these keys, or its beginning: `cut` answers. The keys that it answered."""
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(str(output), ["in.jsonl"], header, resume, again, patience=0))
        done = KeyTable(journal.known)
        to_do = [(row, key) for row, key in enumerate(rows) if not done.set(key, row)]
        parts = [stack.enter_context(PartWriter(str(output), rank, journal.header)) for rank in range(dp)]
        for turn, (row, key) in enumerate(to_do[:cut]):
            parts[turn % dp].write(row, answer(key, key in failing), key, key in failing)
        for part in parts:
            part.close()
        if cut is None:
            journal.finish(dp, done, len(to_do), by_time)
    return [key for _, key in to_do[:cut]]


def rows_of(output: str | Path) -> list[int]:
    """Keys of an output's lines, each of which must be as it was written."""
    rows = []
    for line in Path(output).read_text(encoding="utf-8").split("\n")[:-1]:
        said = json.loads(line)
        assert line == answer(said["row"], said["error"])
        rows.append(said["row"])
    return rows


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB mounted on a folder; the test is skipped where that can't be."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if made.returncode:
        pytest.skip(f"a file system can't be mounted: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
