"""The processes of a node that make finished rows out of lines: one that reads, and its children, which build.

The reader goes through the file in order, numbers rows, knows duplicates and rows that are done, and hands blocks of
lines to the builders in turn; each builder parses, renders and tokenizes its block and publishes it as a batch. What a
batch holds is a function of the file and the configuration alone, however many builders there are.

All of them are forked from a rank, before it has threads or a GPU, so they need no time to start. They end when that
rank does: their pipes are closed then.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from time import sleep
from typing import NamedTuple

from spmd.api.reader import Reader
from spmd.api.rows import BadRow, Job, RowParser, load
from spmd.api.source import num_requests
from spmd.api.tokenizer import load_generation_config, load_tokenizer
from spmd.config import SamplingConfig
from spmd.journal.key_table import KeyTable
from spmd.messages import first_line
from spmd.processes.child import fork
from spmd.processes.folder import AHEAD, NAP, Batch, Built, Folder
from spmd.processes.packed import pack
from spmd.schedule.blocks import hash_blocks

# A block ends with the first row that fills one of these.
BLOCK_ROWS = 64  # to answer
BLOCK_BYTES = 2**18  # of lines to answer
BLOCK_MET = 4096  # rows that were done before

READY = "ready"
A_ROW = b'{"messages": [{"role": "user", "content": "1 + 2 = ?"}]}'


@dataclass(frozen=True)
class Intake:
    """What is to be read, and how rows are built of it. See `Reader` and `RowParser`."""

    input: str
    done: bytes  # keys of rows to pass over
    identity: str
    size: int
    shard: list[int] | None
    tokenizer: str
    model: str
    revision: str | None
    now: datetime  # for templates that write the date
    sampling: SamplingConfig
    max_model_len: int
    vocab_size: int
    block_size: int | None  # of the prefix cache; None: there is none
    builders: int  # processes

    def reader(self) -> Reader:
        return Reader(self.input, None, KeyTable(self.done), self.identity, self.size, self.shard)

    def parser(self) -> RowParser:
        """One that has built a row: what is done once, templates compiled say, is done, for forked processes too.

        It takes a request for as long as the model; what the KV cache can hold isn't known yet.
        """
        parser = RowParser(
            load_tokenizer(self.tokenizer, self.revision, self.now),
            load_generation_config(self.model, self.revision),
            self.sampling,
            self.max_model_len,
            self.max_model_len,
            self.vocab_size,
        )
        parser.parse(A_ROW, 0)
        return parser


class Line(NamedTuple):
    """A row on its way to a builder."""

    number: int  # of its row
    custom_id: str
    text: bytes
    key: int | None
    bad: BadRow | None  # why it can't be answered, if that is known already


@dataclass
class Block:
    """What a builder makes a batch of."""

    lines: list[Line] = field(default_factory=list)
    met: list[tuple[int, int]] = field(default_factory=list)
    bytes: int = 0
    num_rows: int = 0
    consumed: int = 0
    prioritized: int = 0
    last: bool = False

    @property
    def full(self) -> bool:
        return len(self.lines) >= BLOCK_ROWS or self.bytes >= BLOCK_BYTES or len(self.met) >= BLOCK_MET


class Feeder:
    """A process that makes rows, forked from this one. Make it before there are threads or a GPU.

    `load`, then `start`: all that takes time is done between them, while the ranks load weights. So no rank waits for
    it in its first tick, where a guard would take that for a standstill.

    Raises:
        RuntimeError: from any call, the process is gone.
    """

    def __init__(self) -> None:
        self._ours, theirs = Pipe()
        self._path: Path | None = None
        self._pid = fork(lambda: _serve(theirs), theirs.fileno())
        theirs.close()

    def load(self, intake: Intake, ranks: int) -> Path:
        """Get ready to feed so many ranks of this node through a folder, which it returns at once."""
        with _present():
            self._ours.send((intake, ranks))
            self._path = self._ours.recv()
        assert self._path is not None
        return self._path

    @property
    def loaded(self) -> bool:
        """Whether it was asked for rows."""
        return self._path is not None

    def start(self, capacity: int) -> None:
        """Begin, once all that takes time is done or has failed. The KV cache can hold so many tokens of a request."""
        with _present():
            self._ours.send(capacity)
            self._ours.recv()

    def close(self) -> None:
        """End it, and remove its folder."""
        self._ours.close()
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        if self._path:
            shutil.rmtree(self._path, ignore_errors=True)

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def _present() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise RuntimeError("the process that reads the rows is gone; was it killed for memory?") from error


def blocks(reader: Reader) -> Iterator[Block]:
    """All rows of the reader, in order; the last block may be empty."""
    block = Block()
    for found in reader.read():
        if found.place >= 0:
            block.met.append((found.place, found.row.index))
        else:
            bad = found.row if isinstance(found.row, BadRow) else None
            block.lines.append(Line(found.row.index, found.row.custom_id, b"" if bad else found.line, found.key, bad))
            block.bytes += len(found.line)
        if block.full:
            yield _ended(block, reader)
            block = Block()
    block.last = True
    yield _ended(block, reader)


def _ended(block: Block, reader: Reader) -> Block:
    block.num_rows, block.consumed, block.prioritized = reader.rows, reader.consumed, reader.prioritized
    return block


def build(block: Block, parser: RowParser, block_size: int | None) -> Batch:
    """The rows of a block, whatever its lines hold.

    `block_size`: of the prefix cache, for which prompts bring their hashes along; None: there is none.
    """
    before = parser.begun_twice
    built = [_build(line, parser) for line in block.lines]
    if block_size is not None:
        for prompt in (prompt for row in built if isinstance(row, Job) for prompt in row.prompts):
            prompt.hashes = hash_blocks(prompt.tokens, block_size)
    rows = [Built(num_requests(row), _tokens(row, parser.longest), pack(row)) for row in built]
    return Batch(
        rows, block.met, block.num_rows, block.consumed, block.prioritized, parser.begun_twice - before, block.last
    )


def _serve(rank: Connection) -> None:
    """All that the forked process does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads don't survive the builders' fork
    try:
        intake, ranks = rank.recv()
        path = Folder.make(ranks)
        rank.send(path)
        try:
            _feed(intake, Folder(path, ranks), rank)
        finally:
            shutil.rmtree(path, ignore_errors=True)
    except (EOFError, OSError):
        pass  # the rank has ended


def _feed(intake: Intake, folder: Folder, rank: Connection) -> None:
    """Publish all rows, once the rank says so, or why there are none; returns when the rank has ended.

    Raises:
        EOFError: likewise.
    """
    try:
        _publish(intake, folder, rank)
    except EOFError:
        raise
    except Exception as error:
        folder.fail(f"{type(error).__name__}: {first_line(error)}")
        rank.send(READY)  # so that ranks go on and meet the failure; nobody reads it where they have gone on
    while True:
        rank.recv()


def _publish(intake: Intake, folder: Folder, rank: Connection) -> None:
    """Publish all rows, once the rank says so.

    Raises:
        EOFError: the rank has ended.
    """
    parser, builders, first = intake.parser(), list[Connection](), 0
    for _ in range(intake.builders):
        ours, theirs = Pipe()
        fork(partial(_build_blocks, parser, intake.block_size, folder, theirs), theirs.fileno())
        theirs.close()
        builders.append(ours)
    reader = intake.reader()
    reader.taken_names()
    capacity = rank.recv()
    rank.send(READY)
    for builder in builders:
        builder.send(capacity)
    for number, block in enumerate(blocks(reader)):
        while number >= min(folder.taken) + AHEAD:
            if rank.poll():
                rank.recv()  # nothing is said any more: this is its end
            sleep(NAP)
        first = folder.remove_taken(first)
        try:
            builders[number % len(builders)].send((number, block))
        except OSError as error:
            raise RuntimeError("one of its processes is gone; was it killed for memory?") from error


def _build_blocks(parser: RowParser, block_size: int | None, folder: Folder, feeder: Connection) -> None:
    """All that a builder does."""
    try:
        parser.capacity = feeder.recv()
        while True:
            number, block = feeder.recv()
            folder.publish(number, build(block, parser, block_size))
    except (EOFError, OSError):
        pass  # the feeder has ended
    except Exception as error:
        with suppress(OSError):
            folder.fail(f"{type(error).__name__}: {first_line(error)}")


def _tokens(row: Job | BadRow, longest: int) -> int | None:
    """See `Built`. Rows that may go on until nothing more fits are alike, `longest`, however long their prompts are."""
    if isinstance(row, BadRow):
        return None
    asked = max(request.params.max_tokens for request in row.requests)
    return longest if any(r.prompt_len + r.params.max_tokens >= longest for r in row.requests) else asked


def _build(line: Line, parser: RowParser) -> Job | BadRow:
    if line.bad:
        return replace(line.bad, key=line.key)
    row = load(line.text, line.number, lambda _: line.custom_id)
    return replace(row if isinstance(row, BadRow) else parser.build(row), key=line.key)
