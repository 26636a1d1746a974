"""The main job: a file of prompts in, a file of answers out.

torchrun --standalone --nproc-per-node 2 -m spmd.generate topology=pp2 model.path=DIR input=in.jsonl output=out.jsonl
"""

from datetime import datetime
from time import monotonic, perf_counter

from spmd.api.reader import Reader
from spmd.api.rows import RowParser
from spmd.api.tokenizer import load_generation_config, load_tokenizer
from spmd.config import Config
from spmd.engine import Engine, Watch, all_of
from spmd.guard.ending import after_start_up
from spmd.leader import Leader
from spmd.messages import Mistake
from spmd.report.metrics import Metrics
from spmd.report.profile import profiled
from spmd.report.progress import Progress, estimate_rows
from spmd.report.summary import table, write_json
from spmd.run_files import Files, check_paths, first_error
from spmd.runtime.agreement import agree, from_rank_0, together
from spmd.runtime.main import main
from spmd.runtime.run_dir import warn
from spmd.signals import Stop, name
from spmd.topology import Topology
from spmd.worker import Worker, settle, start


def generate(config: Config, topology: Topology, stop: Stop) -> None:
    """Answer every row of `config.input`, or of one shard of it.

    Raises:
        ValueError: what the user can mend.
    """
    check_paths(config)
    settings = settle(config)
    with Files(settings, topology) as files:
        task = from_rank_0(topology, together(topology, files.open))
        assert task is not None
        complete = together(topology, lambda: files.complete(task) if topology.rank == 0 else None)
        if from_rank_0(topology, complete is not None):
            if complete:
                reader, left = complete
                _finish(files, reader, files.write_errors(task, left), len(left))
            return
        agree(together(topology, lambda: files.facts(task)))
        worker = start(settings, topology, stop)
        parser = together(topology, lambda: _parser(worker, task.now))
        reader = files.reader(task, parser)
        together(topology, lambda: files.open_part(task))
        worker.phases.end("tokenizer")
        metrics = _answer(worker, reader, parser, files)
        if metrics and parser.caution:  # of rank 0's replica
            warn(parser.caution, topology.rank)
        if metrics and stop.stopped:
            print(
                f"stopped by {name(stop.stopped)} with {metrics.rows_ok + metrics.rows_failed:,} rows done; "
                f"start again with output={config.output} to go on"
            )
        elif metrics:
            with after_start_up():
                _finish(files, reader, topology.dp, metrics.rows_ok + metrics.rows_failed, metrics)


def _answer(worker: Worker, reader: Reader, parser: RowParser, files: Files) -> Metrics | None:
    """Answer the reader's rows; on rank 0 returns the figures of all ranks."""
    settings, part, journal = worker.settings, files.part, files.journal
    leader = Leader(parser.tokenizer, settings.model.path, Metrics(), part.write) if part else None
    progress = Progress(perf_counter(), settings.progress) if journal else None
    watches: list[Watch] = [_show(progress, reader)] if progress else []
    if journal:
        watches.append(lambda _: journal.watch(monotonic()))
    with profiled(settings.profile, worker.run_dir, worker.topology.rank) as profiler:
        metrics = worker.run(reader, leader, all_of(*watches, profiler), files.close_part)
    if progress and metrics:
        progress.finish(perf_counter(), metrics.rows_ok + metrics.rows_failed, metrics.output_tokens)
    return metrics


def _finish(files: Files, reader: Reader, parts: int, done: int, metrics: Metrics | None = None) -> None:
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
    if unused:
        print(f"put aside: {unused:,} answers of rows that are not in the input now, in {files.journal.paths.unused}")
    print(f"answers: {files.output}")
    if metrics:
        print(f"figures: {write_json(metrics, files.output)}")
    answered = files.journal.answered or (metrics and metrics.rows_ok)
    if not answered and (rows := done + reader.done.num_set):
        raise Mistake(f"none of the {rows:,} rows could be answered; {first_error(files.output)}")


def _parser(worker: Worker, now: datetime) -> RowParser:
    settings, m = worker.settings, worker.settings.model
    return RowParser(
        load_tokenizer(m.tokenizer, m.revision, now),
        load_generation_config(m.path, m.revision),
        settings.sampling,
        m.max_model_len,
        settings.capacity,
        settings.arch.vocab_size,
    )


def _show(progress: Progress, reader: Reader) -> Watch:
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
    main(generate)


if __name__ == "__main__":
    cli()
