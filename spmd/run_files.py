"""The input and the output of one run as its ranks have them: rank 0 holds the output, a replica's leader its part."""

import json
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from spmd.api.answers import error_line
from spmd.api.reader import Reader, check_input, input_digest
from spmd.api.rows import BadRow, RowParser
from spmd.config import Config
from spmd.journal.fingerprint import fingerprint
from spmd.journal.journal import Journal
from spmd.journal.key_table import KeyTable
from spmd.journal.paths import shard_output
from spmd.journal.writer import PartWriter
from spmd.messages import Mistake
from spmd.settings import Settings
from spmd.topology import Topology


@dataclass(frozen=True)
class Task:
    """What rank 0 looks up for all, so that they go through the same rows."""

    size: int  # bytes of input
    done: bytes  # keys of rows to pass over
    header: dict[str, Any]  # of all files of answers
    now: datetime


def check_paths(config: Config) -> tuple[str, str]:
    """The input and the output of a run.

    Raises:
        ValueError: one of them isn't given.
    """
    if config.input is None or config.output is None:
        raise ValueError("input and output must be set: input=prompts.jsonl output=answers.jsonl")
    return config.input, config.output


class Files:
    """A context manager, which lets go of them with all answers in place.

    Raises:
        ValueError: from any call, what the user can mend.
    """

    def __init__(self, settings: Settings, topology: Topology) -> None:
        self.settings = settings
        self.topology = topology
        self.input, output = check_paths(settings)
        self.output = shard_output(output, settings.shard)
        self.journal: Journal | None = None
        self.part: PartWriter | None = None

    def open(self) -> Task | None:
        """Check the input and, on rank 0, take hold of the output; what all ranks must know then."""
        size = check_input(self.input)
        if self.topology.rank:
            return None
        job, again = _job()
        header = {"identity": _identity(self.settings), "model.path": self.settings.model.path, "job": job}
        self.journal = Journal(self.output, self.input, header, self.settings.resume, again)
        return Task(size, self.journal.known, self.journal.header, datetime.now())

    def facts(self, task: Task) -> dict[str, str]:
        """What this rank finds in the files that all ranks read for themselves."""
        found = {"the digest of the input": input_digest(self.input, task.size)}
        return found | {name: str(value) for name, value in _identity(self.settings).items()}

    def reader(self, task: Task, parser: RowParser | None = None) -> Reader:
        """The input from its first row on; without a parser none of its rows can be had."""
        identity = json.dumps(task.header["identity"], sort_keys=True)
        return Reader(self.input, parser, KeyTable(task.done), identity, task.size, self.settings.shard)

    def complete(self, task: Task) -> tuple[Reader, list[BadRow]] | None:
        """On rank 0, if no row is left that a model could answer: a reader that has met all rows, and those left.

        Such are lines that aren't JSON, say, or that have an earlier row's id. Blank lines are no rows.
        """
        reader = self.reader(task)
        left = reader.unanswerable()
        if left is None:
            return None
        if not reader.rows:
            raise Mistake(f"input={self.input} has no rows, only blank lines")
        return reader, left

    def write_errors(self, task: Task, rows: list[BadRow]) -> int:
        """On rank 0, with no model: write down why rows can't be answered. Returns how many parts it made."""
        if not rows:
            return 0
        with PartWriter(self.output, 0, task.header) as part:
            for row in rows:
                part.write(row.index, error_line(row), row.key, True)
            part.close()
        return 1

    def open_part(self, task: Task) -> None:
        """On a leader, make its part."""
        if self.topology.is_leader:
            self.part = PartWriter(self.output, self.topology.dp_rank, task.header)

    def close_part(self) -> None:
        """On a leader, see to it that all of its part is on the disk."""
        if self.part:
            self.part.close()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        if self.part:
            self.part.__exit__(*error)
        if self.journal:
            self.journal.close()


def first_error(output: str) -> str:
    """Of which row the first line of an output of errors is, and what it says."""
    with open(output, "rb") as file:
        line = json.loads(file.readline())
    return f"{line['custom_id']}: {line['error']['message']}"


def _identity(settings: Settings) -> dict[str, Any]:
    """What all answers depend on besides their rows and the kernels' rounding.

    max_model_len is among it, for it ends answers where max_tokens isn't set.
    """
    m = settings.model
    return {
        **fingerprint(m.path, m.load_format, m.revision, m.tokenizer),
        "model.dtype": settings.asked_dtype,
        "model.max_model_len": m.max_model_len,
        "model.overrides": m.overrides,
        **{f"sampling.{key}": value for key, value in settings.default_sampling.items()},
    }


def _job() -> tuple[str | None, bool]:
    """The job that is started again when it is cut, by SLURM or by torchrun, and whether it has been."""
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return job, any(map(int, restarts))
