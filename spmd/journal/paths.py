"""Where the files of an output lie: beside it, through symbolic links."""

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """Everything that belongs to one output."""

    output: Path

    @staticmethod
    def of(output: str) -> "Paths":
        return Paths(Path(output).resolve())

    @property
    def keys(self) -> Path:
        """Of a finished output: whose answer each line is. See `spmd.journal.format`."""
        return self._beside(".journal")

    @property
    def unused(self) -> Path:
        """Answers of rows that have left the input, a journal file."""
        return self._beside(".unused")

    @property
    def folder(self) -> Path:
        """What lies in here is gone once the output is complete."""
        return self._beside(".parts")

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def answered(self) -> Path:
        """What earlier attempts answered, a journal file."""
        return self.folder / "answered.jsonl"

    @property
    def merged(self) -> Path:
        """The next output while it is written."""
        return self.folder / "merged.jsonl"

    @property
    def merged_keys(self) -> Path:
        return self.folder / "merged.journal"

    @property
    def merged_unused(self) -> Path:
        return self.folder / "merged.unused"

    @property
    def spooled(self) -> Path:
        """All rows of an input that isn't one plain file. See `spmd.formats.spool`."""
        return self.folder / "input.jsonl"

    def part(self, dp_rank: int) -> Path:
        """What a replica answers in this attempt, a journal file."""
        return self.folder / f"part-{dp_rank}.jsonl"

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def _beside(self, ending: str) -> Path:
        return self.output.with_name(self.output.name + ending)


def check_errors(errors: str, paths: Paths, inputs: Iterable[str] = ()) -> Path:
    """The file of errors, through symbolic links.

    Raises:
        ValueError: it can't be one, or is one of the other files.
    """
    path = Path(errors).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"errors={errors} is {'a directory' if path.is_dir() else 'no regular file'}")
    if path in (Path(input).resolve() for input in inputs):
        raise ValueError(f"errors={errors} is the input: it would be overwritten")
    if path in (paths.output, paths.keys, paths.unused) or paths.folder in (path, *path.parents):
        raise ValueError(f"errors={errors} is the output or belongs to it: choose another file")
    return path


def make_folder(folder: Path) -> None:
    """Raises: OSError: it can't be made, or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def shard_output(output: str, shard: Sequence[int] | None) -> str:
    """The output of one shard [i, n] of an input: out-00003-of-00010.jsonl for out.jsonl."""
    if shard is None:
        return output
    path, (number, count) = Path(output), shard
    return str(path.with_name(f"{path.stem}-{number:05}-of-{count:05}{path.suffix}"))
