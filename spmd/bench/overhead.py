"""What an addition costs: the same workload with it and without, in turns, on ranks that are loaded once.

Journal and guard, against neither:

torchrun --standalone --nproc-per-node 2 -m spmd.bench.overhead topology=pp2 model=small workload=cpu \
    scheduler.max_num_seqs=16

Text from file to file, against ids of the same lengths (a model with a tokenizer):

torchrun --standalone --nproc-per-node 2 -m spmd.bench.overhead topology=pp2 model=demo workload=chat

Machines are noisy, so a round runs both, the next one in the other order, and what counts is the median of the rounds'
ratios.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

from spmd.bench.runs import Run, ids, text, warm_up
from spmd.config import Config
from spmd.engine import unwatched
from spmd.processes.feeder import Feeder
from spmd.processes.outlet import Outlet
from spmd.runtime.main import main
from spmd.signals import Stop, name
from spmd.topology import Topology
from spmd.worker import Worker, settle, start

ROUNDS = 8

Seconds = Callable[[], float]


def overhead(config: Config, topology: Topology, stop: Stop, processes: Sequence[tuple[Feeder, Outlet]]) -> None:
    """Print the seconds of each round, which takes two of the processes, and the median of their ratios."""
    worker = start(settle(config), topology, stop)
    bare = replace(worker, settings=replace(worker.settings, guard=replace(config.guard, enabled=False)))
    names = ("text", "ids") if config.workload.text else ("with journal and guard", "without")
    ratios = []
    _seconds(worker, ids(worker))  # warms up
    for number, (feeder, outlet) in enumerate(processes):
        if config.workload.text:
            pair = [(worker, text(worker, feeder, outlet)), (worker, ids(worker))]
        else:
            pair = [(worker, _written(worker, outlet)), (bare, ids(bare))]
        order = (1, 0) if number % 2 else (0, 1)
        seconds = {which: _seconds(*pair[which]) for which in order}
        if stop.stopped:  # known alike on all ranks
            if topology.rank == 0:
                print(f"stopped by {name(stop.stopped)} in round {number + 1}: no figures")
            return
        if topology.rank == 0:
            ratios.append(seconds[0] / seconds[1])
            print(f"round {number + 1}: {seconds[0]:.2f} s {names[0]}, {seconds[1]:.2f} s {names[1]}", flush=True)
    if topology.rank == 0:
        print(f"{' / '.join(names)}: median {median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


def _seconds(worker: Worker, way: AbstractContextManager[Run]) -> float:
    """Seconds of the workload on this rank."""
    with way as run:
        warm_up(worker)
        metrics = run(unwatched)
    return metrics.wall_seconds if metrics else 0.0


@contextmanager
def _written(worker: Worker, outlet: Outlet) -> Iterator[Run]:
    """What answers the workload's ids and writes the answers."""
    with tempfile.TemporaryDirectory(prefix="spmd-") as folder, ids(worker, outlet) as run:
        if worker.topology.is_leader:
            outlet.load(None, None)
            outlet.open(str(Path(folder) / "out.jsonl"), worker.topology.dp_rank, {"identity": {}}, "bench")
        yield run


if __name__ == "__main__":
    with ExitStack() as stack:  # before anything has threads
        processes = [(stack.enter_context(Feeder()), stack.enter_context(Outlet())) for _ in range(ROUNDS)]
        main(lambda config, topology, stop: overhead(config, topology, stop, processes))
