"""The input and the output of one run as its ranks have them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from spmd.api.answers import error_line
from spmd.api.reader import Reader, check_input, input_digest
from spmd.api.rows import BESIDE_PROMPT
from spmd.api.tokenizer import load_tokenizer
from spmd.config import Config
from spmd.formats.content import is_plain, roles_in
from spmd.formats.sources import Source, find_sources
from spmd.formats.spool import remove, spool
from spmd.formats.table_output import answers_of, carried_schema, check_table, make_table
from spmd.formats.table_rows import Columns
from spmd.journal.fingerprint import fingerprint, first_form
from spmd.journal.identity import check_identity, told_earlier
from spmd.journal.journal import Journal
from spmd.journal.key_table import KeyTable
from spmd.journal.paths import Paths, shard_output
from spmd.journal.writer import PartWriter
from spmd.messages import Mistake
from spmd.model.checkpoint import resolve, weight_files
from spmd.processes.feeder import Feeder, Intake
from spmd.processes.outlet import Outlet
from spmd.processes.source import PreparedRows
from spmd.runtime.agreement import from_each, on_each_host, together
from spmd.settings import Settings
from spmd.topology import Topology


@dataclass(frozen=True)
class Snapshot:
    """What rank 0 finds when a run begins, for all ranks, so that they go through the same rows."""

    input: str  # the file to read
    size: int  # its bytes
    done: bytes  # keys of rows to pass over
    header: dict[str, Any]  # of all files of answers
    now: datetime


def check_paths(config: Config) -> tuple[list[str], str]:
    """What is given as the input, and the output of a run.

    Raises:
        ValueError: one of them isn't given.
    """
    if config.input is None or config.output is None:
        raise ValueError("input and output must be set: input=prompts.jsonl output=answers.jsonl")
    return [config.input] if isinstance(config.input, str) else config.input, config.output


def columns_of(config: Config) -> Columns:
    """How those of tables are taken."""
    return Columns(config.input_column, BESIDE_PROMPT)


class RunFiles:
    """Input and output of a run on one rank, of which rank 0 holds the latter; a context manager, which lets go of it.

    Raises:
        ValueError: from any call, what the user can mend.
    """

    def __init__(self, settings: Settings, topology: Topology) -> None:
        self.settings = settings
        self.topology = topology
        self.input, output = check_paths(settings)
        self.target = shard_output(output, settings.shard)  # what was asked for
        self.output = answers_of(self.target)  # JSON lines: the target, or what it is made of at the end
        self.carried: Any = None  # columns that a table gets from its input
        self.errors = settings.errors and shard_output(settings.errors, settings.shard)
        self.journal: Journal | None = None

    def open(self) -> Snapshot | None:
        """On rank 0, find the input and take hold of the output; what all ranks must know then."""
        if self.topology.rank:
            return None
        sources = find_sources(self.input)
        plain = sources[0].path if len(sources) == 1 and is_plain(sources[0]) else None
        if plain:
            check_input(plain)
        if roles := roles_in(sources, columns_of(self.settings)):
            print(f"input: {roles[0]}")
        job, again = _job()
        identity = self._identity if self.settings.resume == "fresh" and not again else self._as_begun()
        header = {"identity": identity, "model.path": self.settings.model.path, "job": job}
        files = [source.path for source in sources]
        if self.output != self.target:
            check_table(self.target, files, self.errors, self.settings.resume == "fresh")
            self.carried = carried_schema(sources, columns_of(self.settings))
        self.journal = Journal(self.output, files, header, self.settings.resume, again, errors=self.errors)
        path = plain or self._spool(self.journal, sources, again)
        return Snapshot(path, check_input(path), self.journal.known, self.journal.header, datetime.now())

    def _spool(self, journal: Journal, sources: Sequence[Source], again: bool) -> str:
        """The plain file that is made of the input, for the length of the run."""
        path = journal.paths.spooled
        name = sources[0].path if len(sources) == 1 else f"{len(sources):,} files"
        print(f"input: {name}, kept as lines in {path} until all is answered")
        spool(sources, path, columns_of(self.settings), again)
        return str(path)

    def facts(self, snapshot: Snapshot) -> dict[str, str]:
        """What this rank finds in the files that all ranks read for themselves."""
        check_input(snapshot.input)
        found = {"the digest of the input": input_digest(snapshot.input, snapshot.size)}
        return found | {name: str(value) for name, value in self._identity.items()}

    @cached_property
    def _weights(self) -> list[Path]:
        m = self.settings.model
        return [] if m.load_format == "dummy" else weight_files(resolve(m.path, m.revision))

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What all answers depend on besides their rows and the kernels' rounding.

        max_model_len is among it, for it ends answers where max_tokens isn't set.
        """
        m = self.settings.model
        return {
            **fingerprint(m.path, self._weights, m.revision, m.tokenizer),
            "model.dtype": self.settings.asked_dtype,
            "model.max_model_len": m.max_model_len,
            "model.overrides": m.overrides,
            **{f"sampling.{key}": value for key, value in self.settings.default_sampling.items()},
        }

    def _as_begun(self) -> dict[str, Any]:
        """The identity, with weights as the version put it that began what lies at the output."""
        earlier = first_form(str(told_earlier(Paths.of(self.output), "weights")), self._weights)
        return self._identity | ({"weights": earlier} if earlier else {})

    def check_output(self) -> None:
        """Check that a run could go on from what lies at the output. Only reads, and takes no hold of it.

        A replacement that was cut short is left to the run, which completes it before it looks.
        """
        paths = Paths.of(self.output)
        if self.settings.resume != "fresh" and not paths.merged_keys.exists():
            check_identity(paths, self.output, {"identity": json.loads(json.dumps(self._as_begun()))})

    def reader(self, snapshot: Snapshot) -> Reader:
        """The input from its first row on, to go through it without having rows."""
        done = KeyTable(snapshot.done)
        return Reader(snapshot.input, None, done, _salt(snapshot), snapshot.size, self.settings.shard)

    def load(self, snapshot: Snapshot, feeder: Feeder, outlet: Outlet) -> tuple[PreparedRows, Any]:
        """The rows, as soon as `start` is called, and a leader's tokenizer for stop strings.

        Those of the processes beside this one load meanwhile, and go on with that while the ranks load weights. The
        first rank of each host has its `feeder` make the rows for all ranks there, a leader's `outlet` the answers.
        """
        rows = self._rows(snapshot, feeder)
        return rows, together(self.topology, lambda: self._load_tokenizer(outlet))

    def start(self, snapshot: Snapshot, capacity: int, feeder: Feeder, outlet: Outlet) -> None:
        """Have rows made, and on a leader its part. The KV cache can hold `capacity` tokens of a request."""
        together(self.topology, lambda: self._start(snapshot, capacity, feeder, outlet))

    def _load_tokenizer(self, outlet: Outlet) -> Any:
        m = self.settings.model
        if not self.topology.is_leader:
            return None
        outlet.load(m.tokenizer, m.revision)
        return load_tokenizer(m.tokenizer, m.revision)

    def _rows(self, snapshot: Snapshot, feeder: Feeder) -> PreparedRows:
        rank, firsts = self.topology.rank, on_each_host(self.topology)
        ranks = [each for each, first in enumerate(firsts) if first == firsts[rank]]
        path = together(
            self.topology, lambda: feeder.load(self._intake(snapshot), len(ranks)) if rank == ranks[0] else None
        )
        place = from_each(self.topology, path)[ranks[0]]
        assert place is not None
        return PreparedRows(place, ranks.index(rank), len(ranks), self.reader(snapshot), self.settings.seats_to_fill)

    def _start(self, snapshot: Snapshot, capacity: int, feeder: Feeder, outlet: Outlet) -> None:
        if feeder.loaded:
            feeder.start(capacity)
        if self.topology.is_leader:
            outlet.open(self.output, self.topology.dp_rank, snapshot.header, self.settings.model.path)

    def _intake(self, snapshot: Snapshot) -> Intake:
        """What a feeder is to read."""
        settings, m, shard = self.settings, self.settings.model, self.settings.shard
        return Intake(
            input=snapshot.input,
            done=snapshot.done,
            identity=_salt(snapshot),
            size=snapshot.size,
            shard=shard,
            tokenizer=m.tokenizer,
            model=m.path,
            revision=m.revision,
            now=snapshot.now,
            sampling=settings.sampling,
            max_model_len=m.max_model_len,
            vocab_size=settings.arch.vocab_size,
            block_size=settings.scheduler.block_size if settings.scheduler.prefix_caching else None,
            builders=settings.input_workers or _builders(),
        )

    def complete(self, snapshot: Snapshot) -> tuple[Reader, int] | None:
        """On rank 0, if no row is left that a model could answer: a reader that has met all rows, and how many are so.

        Such are lines that aren't JSON, say, or that have an earlier row's id. Blank lines are no rows.
        """
        reader = self.reader(snapshot)
        left = reader.unanswerable()
        if left is None:
            return None
        if not reader.rows:
            raise Mistake(f"input={','.join(self.input)} has no rows, only blank lines")
        return reader, left

    def write_errors(self, snapshot: Snapshot, left: int) -> int:
        """On rank 0, with no model: write down why the rows left can't be answered. Returns how many parts it made."""
        if not left:
            return 0
        with PartWriter(self.output, 0, snapshot.header) as part:
            for row in self.reader(snapshot).bad_rows():  # once more, for they may be too many for the memory
                part.write(row.index, error_line(row), row.key, True)
            part.close()
        return 1

    def complete_target(self) -> None:
        """On rank 0, with all answers in the output: make a table of them if one is wanted, and drop the input's copy.

        Raises:
            Mistake: the disk is full, say; the next start goes on from there.
        """
        assert self.journal
        paths = self.journal.paths
        if self.output != self.target:
            make_table(paths.output, paths.keys, Path(self.target).resolve(), self.carried)
        remove(paths.spooled)

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self.journal:
            self.journal.close()


def _salt(snapshot: Snapshot) -> str:
    """What goes into the key of every row."""
    return json.dumps(snapshot.header["identity"], sort_keys=True)


def first_error(output: str) -> str:
    """Of which row the first line of an output of errors is, and what it says."""
    with open(output, "rb") as file:
        line = json.loads(file.readline())
    return f"{line['custom_id']}: {line['error']['message']}"


def _builders() -> int:
    """Four for each rank of this node, at most half of the cores that the ranks leave: as many as short rows need."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(4 * ranks, 32, (len(os.sched_getaffinity(0)) - ranks) // 2))


def _job() -> tuple[str | None, bool]:
    """The job that is started again when it is cut, by SLURM or by torchrun, and whether it has been."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return job, any(map(int, restarts))
