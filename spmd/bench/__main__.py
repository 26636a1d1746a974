"""A synthetic workload in, figures out: one table and one line of JSON, with the names `vllm bench` uses.

torchrun --standalone --nproc-per-node 2 -m spmd.bench topology=pp2 model=small workload=cpu
"""

from spmd.bench.workload import jobs
from spmd.build import Worker, start
from spmd.config import Config
from spmd.leader import Leader
from spmd.report.metrics import Metrics
from spmd.report.summary import json_line, table
from spmd.runtime import main
from spmd.topology import Topology

WARM_UP_ROWS = 4  # a replica; enough to meet every kind of forward once


def bench(config: Config, topology: Topology) -> None:
    """Run the workload on random weights or a checkpoint and print what came of it."""
    worker = start(config, topology)
    _run(worker, WARM_UP_ROWS * topology.dp)
    metrics = _run(worker, config.workload.num_prompts)
    if metrics:
        print(table(metrics))
        t, w = config.topology, config.workload
        print(json_line(metrics, workload=w.name, dp=t.dp, pp=t.pp, tp=t.tp, async_depth=config.scheduler.async_depth))


def _run(worker: Worker, num_prompts: int) -> Metrics | None:
    longest = min(worker.capacity, worker.max_model_len)
    source = jobs(worker.config, num_prompts, worker.decoder.arch.vocab_size, longest, worker.topology)
    leader = Leader(None, "bench", Metrics()) if worker.topology.is_leader else None
    return worker.run(source, leader)


if __name__ == "__main__":
    main(bench)
