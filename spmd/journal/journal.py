"""Rank 0's hold on an output: one run at a time, what earlier runs answered, and the replacement at the end.

Answers of a run that was cut stand in `<output>.parts/`, those of a finished one in the output, and those of rows that
have left the input in `<output>.unused`. All of them count, wherever a row stands now, as long as they depend on the
same model and sampling.

Who writes: rank 0, which has the output's lock for the whole run, writes everything but the parts of this run, each of
which the outlet of its replica's leader alone appends to. Rank 0 reads the parts of an earlier run once it has their
locks too, before any leader makes a new part, and those of this run after all leaders have had them closed.

Every answer stands in at least one file at any time: parts of an earlier run are deleted after their answers are on the
disk in `answered`, this run's parts and `answered` after theirs are in the output. The output is replaced by one rename
of `merged`. A run may be cut at any step around that, and the next start tells where: `merged_keys` without `merged`
means after the rename, so what follows it is completed; else `merged*` is dropped, and the parts still have everything.
"""

import errno
import heapq
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from spmd.journal.format import Entry, FinishedOutput, Header, JournalFile, write_entry, write_header
from spmd.journal.identity import INSTEAD, check_identity, header_of, holds_answers, holds_output
from spmd.journal.key_table import KeyTable, pack
from spmd.journal.locked_file import OpenFile, acquire_lock, lock_holder, open_locked, release_lock
from spmd.journal.merge import Merge, Source
from spmd.journal.paths import Paths, check_errors, make_folder
from spmd.journal.writer import CHECK_EVERY
from spmd.messages import Mistake, cannot_write

PATIENCE = 10.0  # seconds that what is left of an earlier run may take to end
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Journal:
    """An output for the length of one run, on rank 0. Leaving it as a context manager leaves all answers in place.

    Args:
        output, inputs: of the run, the latter files.
        header: of all files it writes. Its "identity" is what answers depend on besides their rows; its "job", if
            any, is the one that starts itself again when it is cut.
        resume: auto: pass over all rows that were done; retry_errors: over those with an answer; fresh: over none,
            or, if the job has started itself `again`, over those that it has done since it began.
        patience: seconds to wait for another run's end.
        errors: a file that gets those answers that are errors, too, once the output is replaced.

    Raises:
        Mistake: the output can't be written, another run works on it, or what it holds is not to be mixed with
            answers of this run.
    """

    def __init__(
        self,
        output: str,
        inputs: Sequence[str],
        header: Header,
        resume: str = "auto",
        again: bool = False,
        patience: float = PATIENCE,
        errors: str | None = None,
    ) -> None:
        self.output = output
        self.paths = Paths.of(output)
        self.header: dict[str, Any] = json.loads(write_header(header))
        self.deadline = time.monotonic() + patience
        self.last_check = 0.0
        self.files: list[OpenFile] = []  # files of earlier answers, to be restored if they are deleted
        self.sources: list[Source] = []  # what is in them, oldest first
        self.answered = False  # whether one of them is no error
        self._check_path(inputs)
        self.errors = None if errors is None else check_errors(errors, self.paths, inputs)
        if self.errors:
            with self._reporting("nothing is lost", self.errors):
                make_folder(self.errors.parent)
        with self._reporting("nothing is lost"):
            self.lock = acquire_lock(self.paths.lock, patience)
            try:
                self._open(resume == "fresh" and not (again and self._began()))
                self.known = self._keys(resume == "retry_errors")  # of rows to pass over, for a KeyTable
            except BaseException:
                self.close()
                raise

    def watch(self, now: float) -> None:
        """Restore what was deleted under way; cheap enough for every tick. `now` is of the monotonic clock.

        Raises:
            Mistake: another run has come in meanwhile, or a file can't be restored.
        """
        if now - self.last_check > CHECK_EVERY:
            self.last_check = now
            self._restore()

    def finish(self, dp: int, rows: KeyTable, done: int, by_time: bool = False) -> int:
        """Replace the output at once by all answers to today's rows, once every part is closed.

        Args:
            dp: replicas of this run, each of which has made its part.
            rows: where in today's input the rows of `known` stand.
            done: how many more this run did.
            by_time: in the order in which they were answered instead of the input's.

        Returns:
            How many answers of rows that are not in the input any more were put aside.

        Raises:
            Mistake: the disk is full, or answers are gone; the next start goes on from there.
        """
        self._restore()
        with ExitStack() as stack, self._reporting("everything is answered and safe, only the output is left to write"):
            parts = [stack.enter_context(open(self.paths.part(rank), "rb")) for rank in range(dp)]
            merge = Merge(self.sources, [JournalFile(part) for part in parts], rows)
            if lost := rows.num_set + done - merge.num_rows:
                raise Mistake(
                    f"output={self.output}: {lost:,} answers are gone, somebody changed their files under way; "
                    f"start again to have these rows answered again"
                )
            try:
                merge.write(self.paths, self.header, by_time)
            except OSError:
                self._discard()
                raise
            os.replace(self.paths.merged, self.paths.output)
            self._complete()
            if self.errors:
                with self._reporting("the output is complete", self.errors):
                    merge.write_errors(self.errors)
        self._close_files()
        with suppress(OSError):  # what stays is in the output too, and the next start sees that
            for path in (*self.paths.parts(), self.paths.answered):
                path.unlink()
        return merge.num_unused

    def close(self) -> None:
        """Let the next run in."""
        for file in self.files:
            with suppress(OSError):
                file.restore()
        self._close_files()
        release_lock(self.lock)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore(self) -> None:
        with self._reporting("what was answered in this run is safe"):
            for file in (self.lock, *self.files):
                file.restore()

    def _close_files(self) -> None:
        for file in self.files:
            file.close()
        self.files.clear()

    def _check_path(self, inputs: Sequence[str]) -> None:
        path = self.paths.output
        if path.exists() and not path.is_file():
            raise Mistake(f"output={self.output} is {'a directory' if path.is_dir() else 'no regular file'}")
        if path in (Path(input).resolve() for input in inputs):
            raise Mistake(f"output={self.output} is the input: it would be overwritten")

    @contextmanager
    def _reporting(self, safe: str, errors: Path | None = None) -> Iterator[None]:
        """Make messages of the file system's errors; `safe` says what isn't lost if the disk is full or fails.

        `errors`: it is the file of errors that is written, and not the output.
        """
        what, folder = (f"errors={errors}", errors.parent) if errors else (f"output={self.output}", self.paths.folder)
        try:
            yield
        except BlockingIOError as error:
            who = lock_holder(self.paths.lock)
            raise Mistake(f"{what} is in use by {who}: let it end, or choose another output") from error
        except OSError as error:
            then = f"; {safe}: mend that, then start again with the same output" if error.errno in FULL else ""
            raise Mistake(cannot_write(what, folder, error) + then) from error

    # -- what earlier runs left ---------------------------------------------------------------------------------------

    def _began(self) -> bool:
        """Whether this job began the run that has left what is there."""
        made = header_of(self.paths.answered) or header_of(self.paths.keys) or {}
        return made.get("job") is not None and made["job"] == self.header.get("job")

    def _open(self, fresh: bool) -> None:
        """Make the files ready for this run and read what is in them; with `fresh`, empty."""
        paths = self.paths
        if paths.merged_keys.exists() and not paths.merged.exists():
            self._complete()
        self._discard()
        if not fresh:
            check_identity(paths, self.output, self.header)
        with ExitStack() as stack:
            parts = [stack.enter_context(open_locked(path, self.deadline)) for path in paths.parts()]
            if fresh:
                paths.answered.unlink(missing_ok=True)
            answered = self._keep_open(paths.answered)
            answered.mend()
            if not self._is_ours(paths.answered):  # then it holds no answers
                os.ftruncate(answered.fd, 0)
                answered.append(write_header(self.header))
            if fresh:  # the output itself stays until it is replaced
                paths.keys.unlink(missing_ok=True)
                paths.unused.unlink(missing_ok=True)
            else:
                self._collect(answered, parts)
            for part in parts:
                part.path.unlink()
        if holds_output(paths) and self._is_ours(paths.keys):
            with self._keep_open(paths.keys, reading=True).reader() as keys:
                keys.readline()
                self.sources.append(FinishedOutput(self._keep_open(paths.output, reading=True).reader(), keys))
        if self._is_ours(paths.unused):
            self.sources.append(JournalFile(self._keep_open(paths.unused, reading=True).reader()))
        self.sources.append(JournalFile(answered.reader()))

    def _keep_open(self, path: Path, reading: bool = False) -> OpenFile:
        self.files.append(OpenFile(path, reading))
        return self.files[-1]

    def _is_ours(self, path: Path) -> bool:
        made = header_of(path)
        return made is not None and made["identity"] == self.header["identity"]

    def _collect(self, answered: OpenFile, parts: Iterable[OpenFile]) -> None:
        """Append what the last attempt's parts hold to what earlier ones answered, or nothing if it doesn't fit."""
        size = os.fstat(answered.fd).st_size
        entries = heapq.merge(*(_keyed(JournalFile(part.reader())) for part in parts), key=lambda entry: entry.time)
        try:
            with open(answered.fd, "ab", closefd=False) as file:
                file.writelines(map(write_entry, entries))
            answered.sync()
        except OSError:
            os.ftruncate(answered.fd, size)
            raise

    def _keys(self, retry: bool) -> bytes:
        keys = array("Q")
        try:
            for _, entry in (found for source in self.sources for found in source.entries()):
                if entry.key is not None and not (retry and entry.failed):
                    keys.append(entry.key)
                    self.answered |= not entry.failed
        except ValueError as error:
            raise Mistake(f"output={self.output}: {error}; {INSTEAD}") from error
        return pack(keys)

    # -- the replacement ----------------------------------------------------------------------------------------------

    def _complete(self) -> None:
        """What follows the output's replacement; the next start does it for a run that was cut in between."""
        paths = self.paths
        if paths.merged_unused.exists():
            if holds_answers(paths.merged_unused):
                os.replace(paths.merged_unused, paths.unused)
            else:
                paths.unused.unlink(missing_ok=True)
                paths.merged_unused.unlink()
        os.replace(paths.merged_keys, paths.keys)

    def _discard(self) -> None:
        """Drop a replacement that was not completed: `merged` last, without which it would look like one that was."""
        for path in (self.paths.merged_unused, self.paths.merged_keys, self.paths.merged):
            path.unlink(missing_ok=True)


def _keyed(journal: JournalFile) -> Iterator[Entry]:
    return (entry for _, entry in journal.entries() if entry.key is not None)
