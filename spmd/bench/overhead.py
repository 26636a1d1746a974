"""What journal and guard cost: the same workload with both and with neither, in turn, on ranks that are loaded once.

torchrun --standalone --nproc-per-node 2 -m spmd.bench.overhead topology=pp2 model=small workload=cpu \
    scheduler.max_num_seqs=16

Machines are noisy, so a round runs both, the next one in the other order, and what counts is the median of the rounds'
ratios.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from spmd.bench.workload import Workload
from spmd.config import Config
from spmd.journal.writer import PartWriter
from spmd.leader import Leader
from spmd.report.metrics import Metrics
from spmd.runtime.main import main
from spmd.signals import Stop
from spmd.topology import Topology
from spmd.worker import Worker, settle, start

ROUNDS = 8


def overhead(config: Config, topology: Topology, stop: Stop) -> None:
    """Print the seconds of each round and the median of their ratios."""
    worker = start(settle(config), topology, stop)
    bare = replace(worker, settings=replace(worker.settings, guard=replace(config.guard, enabled=False)))
    ratios = []
    with tempfile.TemporaryDirectory(prefix="spmd-") as folder:
        output = Path(folder) / "out.jsonl"
        _seconds(bare, None)  # warms up
        for number in range(ROUNDS):
            if number % 2:
                without, with_both = _seconds(bare, None), _seconds(worker, output)
            else:
                with_both, without = _seconds(worker, output), _seconds(bare, None)
            if topology.rank == 0:
                ratios.append(with_both / without)
                print(f"round {number + 1}: {with_both:.2f} s with journal and guard, {without:.2f} s without")
    if topology.rank == 0:
        print(f"with / without: median {median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


def _seconds(worker: Worker, output: Path | None) -> float:
    """Seconds of the workload on this rank; with an `output` its answers are built and written there."""
    settings = worker.settings
    source = Workload(settings.workload, settings.arch.vocab_size, settings.longest)
    if not worker.topology.is_leader:
        metrics = worker.run(source, None)
    elif output is None:
        metrics = worker.run(source, Leader(None, "bench", Metrics()))
    else:
        with PartWriter(str(output), worker.topology.dp_rank, {"identity": {}}) as part:
            metrics = worker.run(source, Leader(None, "bench", Metrics(), part.write))
    return metrics.wall_seconds if metrics else 0.0


if __name__ == "__main__":
    main(overhead)
