"""Runs functions on ranks of one host: a few processes that outlive one run, with fresh process groups each time.

A run looks to its ranks as one of torchrun's: the same environment variables, the store in the parent; those that want
a GPU get one each. It ends in bounded time: the first rank to fail fails the run with its traceback, and one that hangs
ends itself and leaves its stacks. After a failure all processes are replaced; none outlives the pool or, for longer
than a run, its parent.
"""

import faulthandler
import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import TCPStore, distributed_c10d

from spmd.parallel.groups import disconnect

GROUPS_OF_A_RUN = 1000  # no run makes as many


class RankFailure(AssertionError):
    """Names the first rank that failed; the message ends with its traceback."""


class Ranks:
    """Up to `most` ranks. A context manager: leaving it ends their processes."""

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["spmd.generate", "tests.support.driver"]
        )  # imported once for all ranks, if it is there
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            forkserver.ensure_running()
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self.runs = 0

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self.folder.cleanup()

    def run(
        self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, grace: float = 0.0
    ) -> list[Any]:
        """Results, by rank, of `function(rank, *args)` on ranks 0 .. size - 1. All must be picklable.

        `grace`: seconds that the other ranks get to end by themselves when one has failed.

        Raises:
            RankFailure: a rank raised, ended or was not done after `timeout` seconds.
        """
        assert size <= self.most
        while len(self.pipes) < size:
            self._start()
        self.runs += 1
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, pipe in enumerate(self.pipes[:size]):
            pipe.send((rank, size, store.port, self.runs, timeout, function, args))
        pending, results = dict(enumerate(self.pipes[:size])), [None] * size
        while pending:
            ready = wait(pending.values())
            for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
                results[rank] = self._result(rank, size, grace)
                del pending[rank]
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        here, there = self.context.Pipe()
        stacks = self._stacks(len(self.pipes))
        process = self.context.Process(target=_serve, args=(there, str(stacks)), daemon=True)
        process.start()
        there.close()
        self.processes.append(process)
        self.pipes.append(here)

    def _result(self, rank: int, size: int, grace: float) -> Any:
        try:
            worked, result = self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            worked, result = False, f"it ended with exit code {self.processes[rank].exitcode}"
        if not worked:
            deadline = time.monotonic() + grace
            for process in self.processes[:size]:
                process.join(max(0.0, deadline - time.monotonic()))
            stuck = [f"\nStacks of rank {other}:\n{text}" for other in range(size) if (text := self._stack_text(other))]
            self.stop()
            raise RankFailure(f"rank {rank} of {size} failed: {result}{''.join(stuck)}")
        return result

    def _stacks(self, rank: int) -> Path:
        return Path(self.folder.name) / f"stacks-{rank}"

    def _stack_text(self, rank: int) -> str:
        return self._stacks(rank).read_text() if self._stacks(rank).exists() else ""


def _serve(pipe: Connection, stacks: str) -> None:
    """The life of a rank's process: one run after the other, until one fails."""
    torch.set_num_threads(1)
    while True:
        try:
            rank, size, port, run, timeout, function, args = pipe.recv()
        except EOFError:  # the parent is gone
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        # Groups are named by a counter that starts anew with each world, but symmetric memory keeps what it knows of a
        # group, its store included, by name and for the life of the process.
        distributed_c10d._world.group_count = run * GROUPS_OF_A_RUN
        with open(stacks, "w") as file:
            faulthandler.dump_traceback_later(timeout, exit=True, file=file)
            try:
                result = function(rank, *args)
                if torch.cuda.is_initialized():
                    gc.collect()  # NCCL ends a communicator only when no CUDA graph holds it
                disconnect()
                pipe.send((True, result))
            except BaseException:
                # Connections stay open: if they closed now, other ranks' errors could come before this one.
                pipe.send((False, f"\n{traceback.format_exc()}"))
                pipe.poll(None)
            faulthandler.cancel_dump_traceback_later()
