"""The main job: a file of prompts in, a file of answers out.

torchrun --standalone --nproc-per-node 2 -m spmd.generate topology=pp2 model.path=DIR input=in.jsonl output=out.jsonl
"""

from time import monotonic, perf_counter

from spmd.api.prompts import BEGUN_TWICE
from spmd.api.reader import Reader
from spmd.config import Config
from spmd.engine import Engine, Watch, all_of
from spmd.guard.ending import after_start_up
from spmd.leader import Leader
from spmd.messages import Mistake
from spmd.processes.feeder import Feeder
from spmd.processes.outlet import Outlet
from spmd.processes.source import PreparedRows
from spmd.report.metrics import Metrics
from spmd.report.profile import profiled
from spmd.report.progress import Progress, estimate_rows
from spmd.report.summary import table, write_json
from spmd.run_files import RunFiles, check_paths, first_error
from spmd.runtime.agreement import agree, from_rank_0, together
from spmd.runtime.main import main
from spmd.runtime.run_dir import warn
from spmd.signals import Stop, name
from spmd.topology import Topology
from spmd.worker import Worker, settle, start


def generate(config: Config, topology: Topology, stop: Stop, feeder: Feeder, outlet: Outlet) -> None:
    """Answer every row of `config.input`, or of one shard of it.

    Args:
        feeder: reads the rows, if this rank is the first of its host.
        outlet: writes the answers, if this rank is the leader of its replica.

    Raises:
        ValueError: what the user can mend.
    """
    check_paths(config)
    settings = settle(config)
    with RunFiles(settings, topology) as files:
        snapshot = from_rank_0(topology, together(topology, files.open))
        assert snapshot is not None
        complete = together(topology, lambda: files.complete(snapshot) if topology.rank == 0 else None)
        if from_rank_0(topology, complete is not None):
            if complete:
                reader, left = complete
                _finish(files, reader, files.write_errors(snapshot, left), left)
            return
        agree(together(topology, lambda: files.facts(snapshot)))
        rows, tokenizer = files.load(snapshot, feeder, outlet)  # before weights
        worker = start(settings, topology, stop, lambda sized: files.start(snapshot, sized.capacity, feeder, outlet))
        leader = Leader(tokenizer, Metrics(), outlet) if topology.is_leader else None
        metrics = _answer(worker, rows, leader, files)
        if metrics and rows.begun_twice:
            warn(BEGUN_TWICE.format(rows.begun_twice), topology.rank)
        if metrics and stop.stopped:
            print(
                f"stopped by {name(stop.stopped)} with {metrics.rows_ok + metrics.rows_failed:,} rows done; "
                f"start again with output={config.output} to go on"
            )
        elif metrics:
            with after_start_up():
                _finish(files, rows, topology.dp, metrics.rows_ok + metrics.rows_failed, metrics)


def _answer(worker: Worker, rows: PreparedRows, leader: Leader | None, files: RunFiles) -> Metrics | None:
    """Answer the rows; on rank 0 returns the figures of all ranks."""
    settings, journal = worker.settings, files.journal
    progress = Progress(perf_counter(), settings.progress) if journal else None
    watches: list[Watch] = [_show(progress, rows)] if progress else []
    if journal:
        watches.append(lambda _: journal.watch(monotonic()))
    with profiled(settings.profile, worker.run_dir, worker.topology.rank) as profiler:
        metrics = worker.run(rows, leader, all_of(*watches, profiler))
    if progress and metrics:
        progress.finish(perf_counter(), metrics.rows_ok + metrics.rows_failed, metrics.output_tokens)
    return metrics


def _finish(
    files: RunFiles, reader: Reader | PreparedRows, parts: int, done: int, metrics: Metrics | None = None
) -> None:
    """Put the output together of earlier answers and `done` more in `parts`, and tell of it, on rank 0.

    `metrics`: None if no model was needed.

    Raises:
        Mistake: no row could be answered, now or earlier; the output, which says why row by row, is complete.
    """
    assert files.journal
    unused = files.journal.finish(parts, reader.done, done, files.settings.output_order == "completion")
    earlier = f"{reader.done.num_set:,}"
    if metrics:
        print(table(metrics))
        if reader.done.num_set:
            print(f"resumed: {earlier} more rows were done by earlier runs")
    else:
        more = f", {done:,} more can't be answered" if done else ""
        print(f"nothing to do: all {earlier} rows were done by earlier runs{more}")
    if reader.prioritized and files.settings.scheduler.policy != "priority":
        print(f"priority: not looked at in {reader.prioritized:,} rows; scheduler.policy=priority does")
    if unused:
        print(f"put aside: {unused:,} answers of rows that are not in the input now, in {files.journal.paths.unused}")
    files.complete_target()
    print(f"answers: {files.target}")
    if files.errors:
        print(f"errors: {files.errors}")
    if metrics:
        print(f"figures: {write_json(metrics, files.target)}")
    answered = files.journal.answered or (metrics and metrics.rows_ok)
    if not answered and (rows := done + reader.done.num_set):
        raise Mistake(f"none of the {rows:,} rows could be answered; {first_error(files.output)}")


def _show(progress: Progress, reader: PreparedRows) -> Watch:
    """Rank 0 shows the latest loads: its own if it is alone, of several replicas what they reported some ticks ago."""

    def watch(engine: Engine) -> None:
        loads = engine.replicas.loads
        running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
        rows = sum(load.claimed for load in loads)
        done = max(0, rows - running - waiting) + reader.done.num_set  # n > 1: n requests a row
        if total := estimate_rows(reader.rows, reader.consumed, reader.size):
            total //= reader.shards
        progress.update(perf_counter(), done, total, engine.replicas.tokens, running, waiting)

    return watch


def cli() -> None:
    """The command `spmd-generate`."""
    with Feeder() as feeder, Outlet() as outlet:  # before anything has threads
        main(lambda config, topology, stop: generate(config, topology, stop, feeder, outlet))


if __name__ == "__main__":
    cli()
