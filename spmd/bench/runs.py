"""What answers a workload on ranks that are ready: its ids from memory, or its text from file to file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spmd.api.sampling_keys import sampling_params
from spmd.api.tokenizer import load_tokenizer
from spmd.bench.text import write_rows
from spmd.bench.workload import Workload
from spmd.config import WorkloadConfig
from spmd.engine import Watch, unwatched
from spmd.leader import Leader
from spmd.processes.feeder import Feeder
from spmd.processes.outlet import Outlet
from spmd.report.metrics import Metrics
from spmd.run_files import RunFiles
from spmd.runtime.agreement import from_rank_0, together
from spmd.schedule.request import SamplingParams
from spmd.settings import Settings
from spmd.worker import Worker

WARM_UP_ROWS, WARM_UP_TOKENS = 4, 8  # of a replica, of a row

Run = Callable[[Watch], Metrics | None]


def warm_up(worker: Worker) -> None:
    """Answer enough of the workload to meet every kind of forward once."""
    workload = worker.settings.workload
    tokens = min(WARM_UP_TOKENS, workload.output_len[1])
    rows = WARM_UP_ROWS * worker.topology.dp
    _answer_ids(worker, replace(workload, num_prompts=rows, output_len=[tokens, tokens]))


@contextmanager
def ids(worker: Worker, outlet: Outlet | None = None) -> Iterator[Run]:
    """What answers the workload's ids; through an `outlet` that is open, if one is given."""
    yield lambda watch: _answer_ids(worker, worker.settings.workload, watch, outlet)


def _answer_ids(
    worker: Worker, workload: WorkloadConfig, watch: Watch = unwatched, outlet: Outlet | None = None
) -> Metrics | None:
    settings = worker.settings
    source = Workload(
        workload, settings.arch.vocab_size, settings.longest, sampling_of_rows(settings), settings.seats_to_fill
    )
    leader = Leader(None, Metrics(), outlet) if worker.topology.is_leader else None
    return worker.run(source, leader, watch)


def sampling_of_rows(settings: Settings) -> SamplingParams:
    """What rows of ids ask for: greedy; with sampling.temperature all of `sampling`, but for what ends a row early."""
    if settings.asked.sampling.temperature is None:
        return SamplingParams(temperature=0.0, ignore_eos=True)
    values = {**settings.default_sampling, "ignore_eos": True, "stop": (), "stop_token_ids": ()}
    return sampling_params(values, settings.model.max_model_len, ())


@contextmanager
def text(worker: Worker, feeder: Feeder, outlet: Outlet) -> Iterator[Run]:
    """What answers the workload's text, from a file in the run directory to another one. Tokenizers load meanwhile."""
    topology, folder = worker.topology, worker.run_dir / "text"
    input, output = (str(folder / name) for name in ("rows.jsonl", "answers.jsonl"))
    settings = replace(worker.settings, input=input, output=output, errors=None, shard=None, resume="fresh")
    together(topology, lambda: _write(folder, settings) if topology.rank == 0 else None)
    with RunFiles(settings, topology) as files:
        snapshot = from_rank_0(topology, together(topology, files.open))
        assert snapshot is not None
        rows, tokenizer = files.load(snapshot, feeder, outlet)
        files.start(snapshot, settings.capacity, feeder, outlet)

        def run(watch: Watch) -> Metrics | None:
            leader = Leader(tokenizer, Metrics(), outlet) if topology.is_leader else None
            return worker.run(rows, leader, watch)

        yield run


def _write(folder: Path, settings: Settings) -> None:
    m = settings.model
    tokenizer = load_tokenizer(m.tokenizer, m.revision)
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("workload.text=true needs a tokenizer with a chat template: set model.tokenizer")
    folder.mkdir(exist_ok=True)
    write_rows(folder / "rows.jsonl", settings.workload, settings.arch.vocab_size, tokenizer)
