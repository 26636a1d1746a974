"""A synthetic workload in, figures out: one table and one line of JSON, with the names `vllm bench` uses.

torchrun --standalone --nproc-per-node 2 -m spmd.bench topology=pp2 model=small workload=cpu
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from spmd.api.tokenizer import load_tokenizer
from spmd.bench.floor import UNKNOWN, figures, lines, ranks_work
from spmd.bench.rates import Rates, device_rates
from spmd.bench.text import write_rows
from spmd.bench.workload import Workload, lengths
from spmd.config import Config, WorkloadConfig
from spmd.engine import Watch, unwatched
from spmd.leader import Leader
from spmd.processes.feeder import Feeder
from spmd.processes.outlet import Outlet
from spmd.report.metrics import Metrics
from spmd.report.profile import profiled
from spmd.report.summary import json_line, table
from spmd.run_files import RunFiles
from spmd.runtime.agreement import from_rank_0, together
from spmd.runtime.main import main
from spmd.settings import Settings
from spmd.signals import Stop, name
from spmd.topology import Topology
from spmd.worker import Worker, settle, start

WARM_UP_ROWS, WARM_UP_TOKENS = 4, 8  # of a replica, of a row


def bench(config: Config, topology: Topology, stop: Stop, feeder: Feeder, outlet: Outlet) -> None:
    """Run the workload on random weights or a checkpoint and print what came of it.

    `feeder` and `outlet` are for text, as in `spmd.generate`.
    """
    worker = start(settle(config), topology, stop)
    settings = worker.settings
    rates = device_rates(config.bench, worker.device, settings.arch.dtype) if topology.rank == 0 else None
    with _text(worker, feeder, outlet) if config.workload.text else _ids(worker) as run:
        _answer_ids(worker, _short(config.workload, topology.dp))
        if stop.stopped:  # known alike on all ranks
            if topology.rank == 0:
                print(f"stopped by {name(stop.stopped)} while warming up: no figures")
            return
        worker.phases.end("warm-up")
        with profiled(config.profile, worker.run_dir, topology.rank) as profiler:
            metrics = run(profiler)
    if metrics:
        reached = _reached(worker, metrics, rates)
        print(table(metrics, lines(reached)))
        if stop.stopped:
            rows = f"{metrics.rows_ok:,} of {config.workload.num_prompts:,} rows"
            print(f"stopped by {name(stop.stopped)} with {rows} done: figures of these, and no floor")
        t, w = settings.topology, settings.workload
        about = {"workload": w.name, "dp": t.dp, "pp": t.pp, "tp": t.tp, "async_depth": settings.scheduler.async_depth}
        print(json_line(metrics, **about, **reached, startup_phases=worker.phases.seconds))


def _reached(worker: Worker, metrics: Metrics, rates: Rates | None) -> Mapping[str, Any]:
    """How much of what the device can do was made use of; all None if not all of the workload was done."""
    if worker.stop.stopped:
        return UNKNOWN
    settings = worker.settings
    work = ranks_work(settings, lengths(settings.workload, settings.arch.vocab_size))
    return figures(work, rates, metrics.wall_seconds, metrics.output_tokens)


def _short(workload: WorkloadConfig, dp: int) -> WorkloadConfig:
    """Enough of the workload to meet every kind of forward once."""
    tokens = min(WARM_UP_TOKENS, workload.output_len[1])
    return replace(workload, num_prompts=WARM_UP_ROWS * dp, output_len=[tokens, tokens])


Run = Callable[[Watch], Metrics | None]


def _answer_ids(worker: Worker, workload: WorkloadConfig, watch: Watch = unwatched) -> Metrics | None:
    source = Workload(workload, worker.settings.arch.vocab_size, worker.settings.longest)
    leader = Leader(None, Metrics()) if worker.topology.is_leader else None
    return worker.run(source, leader, watch)


@contextmanager
def _ids(worker: Worker) -> Iterator[Run]:
    """What answers the workload's ids."""
    yield lambda watch: _answer_ids(worker, worker.settings.workload, watch)


@contextmanager
def _text(worker: Worker, feeder: Feeder, outlet: Outlet) -> Iterator[Run]:
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


def cli() -> None:
    """The command `spmd-bench`."""
    with Feeder() as feeder, Outlet() as outlet:  # before anything has threads
        main(lambda config, topology, stop: bench(config, topology, stop, feeder, outlet))


if __name__ == "__main__":
    cli()
