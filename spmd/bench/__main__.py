"""A synthetic workload in, figures out: one table and one line of JSON, with the names `vllm bench` uses.

torchrun --standalone --nproc-per-node 2 -m spmd.bench topology=pp2 model=small workload=cpu
"""

from collections.abc import Mapping
from typing import Any

from spmd.bench.floor import UNKNOWN, figures, lines, ranks_work
from spmd.bench.rates import Rates, device_rates
from spmd.bench.runs import ids, text, warm_up
from spmd.bench.workload import lengths
from spmd.config import Config
from spmd.processes.feeder import Feeder
from spmd.processes.outlet import Outlet
from spmd.report.metrics import Metrics
from spmd.report.profile import profiled
from spmd.report.summary import json_line, shares, table
from spmd.runtime.main import main
from spmd.signals import Stop, name
from spmd.topology import Topology
from spmd.worker import Worker, settle, start


def bench(config: Config, topology: Topology, stop: Stop, feeder: Feeder, outlet: Outlet) -> None:
    """Run the workload on random weights or a checkpoint and print what came of it.

    `feeder` and `outlet` are for text, as in `spmd.generate`.
    """
    worker = start(settle(config), topology, stop)
    settings = worker.settings
    rates = device_rates(config.bench, worker.device, settings.arch.dtype) if topology.rank == 0 else None
    with text(worker, feeder, outlet) if config.workload.text else ids(worker) as run:
        warm_up(worker)
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
        if each := reached["stage_floor_percent"]:
            print("\n".join(["", *shares("floor (%)", each)]))
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
    accounts = [account for _, account in sorted(metrics.stages.items())]
    return figures(work, rates, metrics.wall_seconds, metrics.output_tokens, accounts)


def cli() -> None:
    """The command `spmd-bench`."""
    with Feeder() as feeder, Outlet() as outlet:  # before anything has threads
        main(lambda config, topology, stop: bench(config, topology, stop, feeder, outlet))


if __name__ == "__main__":
    cli()
