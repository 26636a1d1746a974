"""The lockstep guard: a thread beside the loop that ends this rank, in bounded time, when the run can't go on.

Each rank leaves a sign of life in torchrun's store once a beat, with what its recorder holds, and looks at that of the
next rank. Whoever finds something wrong looks at more of them, and the first verdict ends the whole run: one rank
prints it, all write it and their stacks to their logs. Signals to stop reach the leaders the same way.

The store's keys: `beat/<rank>`, which that rank's guard alone writes and all others read; `alarm`, why the run ends,
which the first one writes (the store compares and sets it in one step) and all read; `stop`, a signal, from any rank.

What a rank did after its last sign of life is in its recorder, which ranks of its machine can read even when it has
ended. On suspicion each rank writes down what it can see of these, as `rank-<n>.recorder` in the folder of the logs,
each file at one go: that is what ranks of other machines read, if they share the folder.

The store may be what is lost: rank 0 keeps it where there is no torchrun, else the first machine's torchrun does. Then
each rank judges by what ranks' recorders hold and speaks for itself.

Threads of a rank: the loop, which sets `error`, `closing` and `closed`; the guard, which has all else to itself; and
one that watches for how long the guard has heard nothing from the store, where it may wait for ever. It only reads
`heard` and asks the stall detector. Whichever ends the process ends it for all.
"""

import json
import logging
import math
import os
import threading
import time
from array import array
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from spmd.config import GuardConfig
from spmd.guard.ending import End, Place, end_rank, is_symptom, own_failure, this_machine, this_place
from spmd.guard.recorder import NONE, Peer, Recorder, StallDetector, Trace, traced
from spmd.guard.verdict import RankStatus, judge
from spmd.messages import first_line
from spmd.signals import FAILED, Stop
from spmd.topology import Topology

BEAT = 1.0  # seconds between signs of life, at most
BEATS_TO_LOOK = 4  # for which a suspicion must last, and a rank's silence while it does
WAITS = 0.6  # of the timeout until silence or a stall is suspicious; the rest is for looking and for telling
STANDSTILL = 4.0  # timeouts until a run ends in which nobody is lost and nothing differs, but nothing moves either
log = logging.getLogger("spmd")


class Guard(threading.Thread):
    """Watches over what runs inside it as a context manager. With `config.enabled` off it only passes on signals.

    An error inside doesn't come out: the run ends, with a message from the rank that knows why.
    """

    def __init__(self, topology: Topology, config: GuardConfig, logs: Path, stop: Stop, computes: bool) -> None:
        """To be made in the loop's thread.

        Args:
            logs: folder of the ranks' logs.
            stop: passed on to the leaders when it is asked here, and set on leaders when it is asked elsewhere.
            computes: whether this rank's forward runs on its own processor, so that processor time is a sign of life.

        Raises:
            ValueError: no way to the store.
        """
        super().__init__(name="guard", daemon=True)
        self.topology = topology
        self.config = config
        self.logs = logs
        self.stop = stop
        self.beat = min(BEAT, config.timeout / 20)
        self.patience = config.timeout * WAITS
        self.store = _connect_store(config.timeout)
        self.peer = (topology.rank + 1) % topology.world_size  # the rank that this one looks at
        self.recorder = Recorder()
        self.stall = StallDetector(self.recorder, computes)
        self.beats = 0
        self.heard = time.monotonic()  # from the store, at the end of a round
        self.closing, self.closed = threading.Event(), threading.Event()
        self.error: BaseException | None = None  # the loop's
        self.error_time = 0.0
        self.places: list[Place] = []  # of all ranks, once all have come in
        self.recorders: dict[int, Peer] = {}  # of ranks in view on this machine
        self.seen: dict[int, tuple[bytes, float]] = {}  # of ranks: the latest sign of life, and when it was new
        self.suspicious_since = 0.0  # 0: nothing is suspicious
        self.relayed = False

    def __enter__(self) -> "Guard":
        """Every rank must come in."""
        places: list[Place | None] = [None] * self.topology.world_size
        dist.all_gather_object(places, this_place(self.topology, self.recorder.fd))
        self.places = [place for place in places if place]
        for rank in self._in_view():
            with suppress(OSError):
                if self.places[rank].machine == this_machine():
                    self.recorders[rank] = Peer(self.places[rank].pid, self.places[rank].recorder)
        self._send_beat()
        self.start()
        if self.config.enabled:
            threading.Thread(target=self._watch_the_store, name="guard's guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self.config.enabled:
            self.closing.set()
            self.join()
            with suppress(dist.DistError):  # rank 0 has done all and ended, and the store with it
                self._send_beat(done=True)
            self.closed.set()
            self.recorder.close()
            for recorder in self.recorders.values():
                recorder.close()
            return
        self.stop.gently = True  # torchrun ends those that a lost rank leaves behind; first let them say why
        log.error("the loop failed", exc_info=error)
        self.error_time = time.monotonic()
        self.error = error  # after its time: the guard looks at both
        self.join()  # the thread ends the process
        os._exit(FAILED)

    def run(self) -> None:
        while not self.closing.wait(self.beat):
            try:
                self._relay()
                if self.config.enabled:
                    self._send_beat()
                    self._watch()
                self.heard = time.monotonic()
            except dist.DistError:
                log.exception("the guard has lost the store")
                self._write_down()
                if not self.closing.wait(BEATS_TO_LOOK * self.beat) and self.config.enabled:  # nor is the run over
                    self._end_without_store()
            except Exception as error:
                log.exception("the guard failed")
                if self.config.enabled:
                    rank = self.topology.rank
                    self._end(End(f"the guard of rank {rank} failed: {first_line(error)}", FAILED, (), rank))

    def _relay(self) -> None:
        """Signals on any rank become known to all leaders."""
        if self.stop.asked and not self.relayed:
            self.store.set("stop", str(self.stop.asked))
            self.relayed = True
        elif not self.stop.asked and self.topology.is_leader and self.store.check(["stop"]):
            self.stop.asked, self.relayed = int(self.store.get("stop")), True

    def _send_beat(self, done: bool = False) -> None:
        """This rank lives: how often it said so, for how many ms its loop has stalled, whether it is done."""
        self.beats += 1
        head = array("q", [self.beats, int(1000 * self.stall.seconds()), done])
        self.store.set(f"beat/{self.topology.rank}", head.tobytes() + self.recorder.content())

    def _watch(self) -> None:
        """End this rank if the run ends or its loop has failed; else look at the next rank, and on suspicion at more.

        Suspicious is an error here that follows from another rank's, silence of the next rank, and a stall here. There
        is no verdict before that has lasted for some beats, in which ranks looked at only now can show that they live.
        """
        if self.store.check(["alarm"]):
            self._end(End(**json.loads(self.store.get("alarm"))))
        if self.error and not is_symptom(self.error):
            self._alarm(own_failure(self.error, self.topology.rank, self.places))
        peer = self._status(self.peer)
        silent = not peer.done and peer.silent > self.patience
        if not (self.error or silent or self.stall.seconds() > self.patience):
            self.suspicious_since = 0.0
            return
        now = time.monotonic()
        if not self.suspicious_since:  # the others weren't looked at of late
            self.suspicious_since, self.seen = now, {self.peer: self.seen[self.peer]}
            self._write_down()
        statuses = [self._status(rank) for rank in self._in_view()]
        if now - self.suspicious_since >= BEATS_TO_LOOK * self.beat:
            silence = (BEATS_TO_LOOK - 1) * self.beat if self.error or silent else self.patience
            self._judge(statuses, silence, now)

    def _judge(self, statuses: list[RankStatus], silence: float, now: float) -> None:
        """End the run if something is wrong with the ranks in view or, after a while, for this rank's own error.

        `silence`: seconds without a sign of life that make a rank a lost one. Only who sees all ranks tells a
        standstill.
        """
        standstill = STANDSTILL * self.config.timeout if len(statuses) == self.topology.world_size else math.inf
        if found := judge(statuses, self.topology.replicas(), silence, standstill):
            self._alarm(End(found.message, FAILED, found.lost, self.topology.rank))
        if self.error and now - self.error_time > self.patience:
            self._alarm(own_failure(self.error, self.topology.rank, self.places))

    def _in_view(self) -> list[int]:
        """Ranks that this one looks at: its replica's and the next one; rank 0 at all, for it tells a standstill."""
        if self.topology.rank == 0:
            return [*range(self.topology.world_size)]
        return sorted({*self.topology.replicas()[self.topology.dp_rank], self.peer})

    def _status(self, rank: int) -> RankStatus:
        """What a rank's latest sign of life says and, if that is some beats old, its recorder."""
        key, now = f"beat/{rank}", time.monotonic()
        beat = self.store.get(key) if self.store.check([key]) else b""
        if rank not in self.seen or self.seen[rank][0] != beat:
            self.seen[rank] = beat, now
        silent = now - self.seen[rank][1]
        if not beat:
            return RankStatus(rank, self.places[rank].text, silent, 0.0)
        _, stalled, done = array("q", beat[:24])
        tick, trace = traced(beat[24:])
        if silent > (BEATS_TO_LOOK - 1) * self.beat:  # what it did after its last sign of life
            last, more = self._recorded(rank)
            tick, trace = max(tick, last), trace | more
        return RankStatus(rank, self.places[rank].text, silent, stalled / 1000, tick, trace, bool(done))

    def _recorded(self, rank: int) -> tuple[int, Trace]:
        """A rank's last tick and digests by its recorder or, on another machine, what was written down of it."""
        with suppress(OSError, IndexError):
            if rank in self.recorders:
                return traced(self.recorders[rank].content())
            return traced(self._written_down(rank).read_bytes())
        return NONE, {}

    def _write_down(self) -> None:
        """Leave what the recorders in view on this machine hold to ranks of other machines."""
        for rank, recorder in self.recorders.items():
            file = self._written_down(rank)
            with suppress(OSError):
                aside = file.with_suffix(f".{self.topology.rank}")
                aside.write_bytes(recorder.content())
                os.replace(aside, file)

    def _written_down(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.recorder"

    def _watch_the_store(self) -> None:
        """A store whose keeper is stopped, or whose machine is gone, lets the guard wait for ever."""
        looks = 0
        while not self.closed.wait(self.beat):
            silent, stalled = time.monotonic() - self.heard, self.stall.seconds()
            # A loop that moves may come to its end without the store.
            looks = looks + 1 if min(silent, stalled) > self.patience else 0
            if looks == 1:
                self._write_down()
            if looks > BEATS_TO_LOOK:
                self._end_without_store()

    def _end_without_store(self) -> NoReturn:
        """End this rank: the store is lost. Its keeper is, unless ranks have drifted apart and that has killed it."""
        silent, keeper = time.monotonic() - self.heard, () if _kept_by_torchrun() else (0,)
        statuses = [
            RankStatus(rank, self.places[rank].text, silent * (rank in keeper), 0.0, *self._recorded(rank))
            for rank in sorted({*self._in_view(), *keeper})
        ]
        found = judge(statuses, self.topology.replicas(), 0.0, math.inf)
        message = (
            f"torchrun on {os.environ['MASTER_ADDR']}, which keeps the ranks' store, gave no sign of life for "
            f"{silent:.0f} s, at tick {self.recorder.tick}: killed, stopped, or its host is gone"
        )
        self._end(End(found.message if found else message, FAILED, keeper, self.topology.rank))

    def _alarm(self, end: End) -> NoReturn:
        """End the run, unless another rank has already said why it ends: then for that reason."""
        first = self.store.compare_set("alarm", "", json.dumps(end._asdict()))
        self._end(End(**json.loads(first)))

    def _end(self, end: End) -> NoReturn:
        """End this rank. Where the store ends with it, it first waits until the others have read why."""
        keeps_store = self.topology.rank == 0 and not _kept_by_torchrun()
        end_rank(end, self.topology.rank, self.places, self.logs, 3 * self.beat if keeps_store else 0.0)


def _connect_store(timeout: float) -> Any:  # by torch's stubs, a store's values can't be bytes
    """A connection of one's own to the store of this attempt's ranks, a `torch.distributed.Store`.

    Raises:
        ValueError: it can't be reached.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=max(1.0, timeout * (1 - WAITS) / 2))
    try:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
    except dist.DistError as error:
        raise ValueError(f"the ranks' store at {host}:{port} can't be reached: {error}") from error
    return dist.PrefixStore(f"guard/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _kept_by_torchrun() -> bool:
    """Whether the store is torchrun's; else it is rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
