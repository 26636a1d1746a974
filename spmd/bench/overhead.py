"""What journal and guard cost: the same workload with both and with neither, in turn, on ranks that are loaded once.

torchrun --standalone --nproc-per-node 2 -m spmd.bench.overhead topology=pp2 model=small workload=cpu \
    scheduler.max_num_seqs=16

Machines are noisy, so a round runs both, the next one in the other order, and what counts is the median of the rounds'
ratios.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

from spmd.bench.workload import Workload
from spmd.config import Config
from spmd.leader import Leader
from spmd.processes.outlet import Outlet
from spmd.report.metrics import Metrics
from spmd.runtime.main import main
from spmd.signals import Stop
from spmd.topology import Topology
from spmd.worker import Worker, settle, start

ROUNDS = 8


def overhead(config: Config, topology: Topology, stop: Stop, outlets: Sequence[Outlet]) -> None:
    """Print the seconds of each round, which takes one of the outlets, and the median of their ratios."""
    worker = start(settle(config), topology, stop)
    bare = replace(worker, settings=replace(worker.settings, guard=replace(config.guard, enabled=False)))
    ratios = []
    with tempfile.TemporaryDirectory(prefix="spmd-") as folder:
        output = Path(folder) / "out.jsonl"
        _seconds(bare)  # warms up
        for number, outlet in enumerate(outlets):
            if number % 2:
                without, with_both = _seconds(bare), _seconds(worker, output, outlet)
            else:
                with_both, without = _seconds(worker, output, outlet), _seconds(bare)
            if topology.rank == 0:
                ratios.append(with_both / without)
                print(f"round {number + 1}: {with_both:.2f} s with journal and guard, {without:.2f} s without")
    if topology.rank == 0:
        print(f"with / without: median {median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


def _seconds(worker: Worker, output: Path | None = None, outlet: Outlet | None = None) -> float:
    """Seconds of the workload on this rank; with an `output` its answers are built and written there."""
    settings = worker.settings
    source = Workload(settings.workload, settings.arch.vocab_size, settings.longest)
    if not worker.topology.is_leader:
        metrics = worker.run(source, None)
    elif outlet is None:
        metrics = worker.run(source, Leader(None, Metrics()))
    else:
        outlet.load(None, None)
        outlet.open(str(output), worker.topology.dp_rank, {"identity": {}}, "bench")
        metrics = worker.run(source, Leader(None, Metrics(), outlet))
    return metrics.wall_seconds if metrics else 0.0


if __name__ == "__main__":
    with ExitStack() as stack:
        outlets = [stack.enter_context(Outlet()) for _ in range(ROUNDS)]  # before anything has threads
        main(lambda config, topology, stop: overhead(config, topology, stop, outlets))
