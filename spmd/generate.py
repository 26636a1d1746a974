"""The main job: a file of prompts in, a file of answers out.

torchrun --standalone --nproc-per-node 2 -m spmd.generate topology=pp2 model.path=DIR input=in.jsonl output=out.jsonl
"""

from collections.abc import Callable
from datetime import datetime
from time import perf_counter

from spmd.build import Worker, start
from spmd.config import Config
from spmd.engine import Engine
from spmd.io.reader import Reader, check_input
from spmd.io.rows import RowParser
from spmd.io.tokenizing import load_generation_config, load_tokenizer
from spmd.io.writer import PartWriter, merge, prepare_output
from spmd.leader import Leader
from spmd.report.metrics import Metrics
from spmd.report.profile import profiled
from spmd.report.progress import Progress, estimate_rows
from spmd.report.summary import table, write_json
from spmd.report.watch import all_of
from spmd.runtime import from_rank_0, main, together
from spmd.signals import Stop, name
from spmd.topology import Topology


def generate(config: Config, topology: Topology, stop: Stop) -> None:
    """Answer every row of `config.input`.

    Raises:
        ValueError: what the user can mend.
    """
    input, output = config.input, config.output
    if input is None or output is None:
        raise ValueError("input and output must be set: input=prompts.jsonl output=answers.jsonl")

    answered: list[int] = []  # by earlier attempts
    size = 0  # bytes of input

    def check_files() -> None:
        nonlocal size
        size = check_input(input)
        if topology.rank == 0:
            answered.extend(prepare_output(output, input, config.resume == "auto"))

    worker = start(config, topology, stop, check_files)
    answered, size, now = from_rank_0(topology, (answered, size, datetime.now()))
    parser = together(topology, lambda: _parser(worker, now))
    reader = Reader(input, parser, answered, _identity(config), size)
    writer = together(topology, lambda: PartWriter(output, topology.dp_rank) if topology.is_leader else None)
    leader = Leader(parser.tokenizer, str(config.model.path), Metrics(), writer.write) if writer else None
    progress = Progress(perf_counter(), config.progress) if topology.rank == 0 else None
    worker.phases.end("tokenizer")
    shown = _show(progress, reader) if progress else None
    with profiled(config.profile, worker.run_dir, topology.rank) as profiler:
        metrics = worker.run(reader, leader, all_of(shown, profiler))
    if writer:
        writer.close()
    together(topology, lambda: None)  # every part is closed
    if stop.stopped:
        if metrics:
            print(
                f"stopped by {name(stop.stopped)} with {metrics.rows_ok + metrics.rows_failed:,} rows done; "
                f"start again with output={output} to go on"
            )
        return
    if progress and metrics:
        progress.finish(perf_counter(), metrics.rows_ok + metrics.rows_failed, metrics.output_tokens)
        merge(output, topology.dp, config.output_order, reader.placed)
        print(table(metrics))
        if reader.placed:
            print(f"resumed: {len(reader.placed):,} more rows were answered by an earlier attempt")
        print(f"answers: {output}\nfigures: {write_json(metrics, output)}")


def _identity(config: Config) -> str:
    """What an answer depends on besides its row, the weights at `model.path` and room where max_tokens isn't set."""
    return repr((config.model, config.sampling))


def _parser(worker: Worker, now: datetime) -> RowParser:
    m, arch = worker.config.model, worker.arch
    assert m.path is not None
    return RowParser(
        load_tokenizer(m.tokenizer or m.path, m.revision, now),
        load_generation_config(m.path, m.revision),
        worker.config.sampling,
        worker.max_model_len,
        worker.capacity,
        arch.vocab_size,
    )


def _show(progress: Progress, reader: Reader) -> Callable[[Engine], None]:
    """Rank 0 knows its own replica, and of several what they told a few ticks ago."""

    def watch(engine: Engine) -> None:
        scheduler, balance = engine.scheduler, engine.balance
        rows, tokens = engine.rows, engine.output_tokens
        running, waiting = scheduler.num_running, len(scheduler.waiting)
        if loads := balance.loads:
            rows, tokens = sum(load.claimed for load in loads), balance.tokens
            running, waiting = sum(load.running for load in loads), sum(load.waiting for load in loads)
        done = max(0, rows - running - waiting) + len(reader.placed)  # n > 1: n requests a row
        total = estimate_rows(reader.rows, reader.consumed, reader.size)
        progress.update(perf_counter(), done, total, tokens, running, waiting)

    return watch


if __name__ == "__main__":
    main(generate)
