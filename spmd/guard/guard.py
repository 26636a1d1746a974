"""The lockstep guard: a thread beside the loop that ends this rank, in bounded time, when the run can't go on.

Each rank leaves a sign of life in torchrun's store once a beat, with what its recorder holds, and looks at that of the
next rank. Whoever finds something wrong looks at more of them, and the first verdict ends the whole run: one rank
prints it, all write it and their stacks to their logs. Signals to stop reach the leaders the same way.

The store may be what is lost: rank 0 keeps it where there is no torchrun, else the first machine's torchrun does. Then
each rank judges by what ranks' recorders hold and speaks for itself.
"""

import faulthandler
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from array import array
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from spmd.config import GuardConfig
from spmd.guard.recorder import NONE, Recorder, StallDetector, Trace, traced
from spmd.guard.verdict import RankStatus, judge
from spmd.schedule.digests import Diverged
from spmd.signals import Stop, report
from spmd.topology import Topology

BEAT = 1.0  # seconds between signs of life, at most
BEATS_TO_LOOK = 4  # for which a suspicion must last, and a rank's silence while it does
WAITS = 0.6  # of the timeout until silence or stillness is suspicious; the rest is for looking and for telling
STANDSTILL = 4.0  # timeouts until a run ends in which nobody is lost and nothing differs, but nothing moves either
FAILED, USAGE = 1, 2  # exit statuses: something broke; something the user can mend
log = logging.getLogger("spmd")


class Guard(threading.Thread):
    """Watches over what runs inside it as a context manager. With `config.enabled` off it only passes on signals.

    An error inside doesn't come out: the run ends, with a message from the rank that knows why.
    """

    def __init__(self, topology: Topology, config: GuardConfig, logs: Path, stop: Stop, computes: bool) -> None:
        """To be made in the loop's thread.

        Args:
            logs: folder of the ranks' logs.
            stop: told to the leaders when it is asked here, and set on leaders when it is asked elsewhere.
            computes: whether this rank's forward runs on its own processor, so that processor time is a sign of life.

        Raises:
            ValueError: no way to its folder or to the store.
        """
        super().__init__(name="guard", daemon=True)
        self.topology = topology
        self.config = config
        self.logs = logs
        self.stop = stop
        self.beat = min(BEAT, config.timeout / 20)
        self.patience = config.timeout * WAITS
        self.store = _store(config.timeout)
        self.peer = (topology.rank + 1) % topology.world_size  # the rank that this one looks at
        self.recorder = Recorder(self._box(topology.rank))
        self.beats = 0
        self.heard = time.monotonic()  # from the store, at the end of a round
        self.closing, self.closed = threading.Event(), threading.Event()
        self.error: BaseException | None = None  # the loop's
        self.error_time = 0.0
        self.motion = StallDetector(self.recorder, computes)
        self.places = [(str(topology), "", 0)] * topology.world_size  # role, host and process; machine; process
        self.seen: dict[int, tuple[bytes, float]] = {}  # of ranks: the latest sign of life, and when it was new
        self.looking_since = 0.0  # 0: nothing is suspicious
        self.relayed = False

    def __enter__(self) -> "Guard":
        """Every rank must come in."""
        t = self.topology
        place = f"{t}, {socket.gethostname()}, pid {os.getpid()}"
        dist.all_gather_object(self.places, (place, _machine(), os.getpid()))
        self._sign()
        self.start()
        if self.config.enabled:
            threading.Thread(target=self._mind_the_store, name="guard's guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self.config.enabled:
            self.closing.set()
            self.join()
            with suppress(dist.DistError):  # rank 0 has done all and ended, and the store with it
                self._sign(done=True)
            self.closed.set()
            return
        self.stop.gently = True  # torchrun ends those that a lost rank leaves behind; first let them say why
        log.error("the loop failed", exc_info=error)
        self.error, self.error_time = error, time.monotonic()
        self.join()  # the thread ends the process
        os._exit(FAILED)

    def run(self) -> None:
        while not self.closing.wait(self.beat):
            try:
                self._relay()
                if self.config.enabled:
                    self._sign()
                    self._watch()
                self.heard = time.monotonic()
            except dist.DistError:
                log.exception("the guard has lost the store")
                if not self.closing.wait(BEATS_TO_LOOK * self.beat) and self.config.enabled:  # nor is the run over
                    self._tell_of_the_store()
            except Exception as error:
                log.exception("the guard failed")
                if self.config.enabled:
                    said = str(error).split("\n")[0]
                    self._end(f"the guard of rank {self.topology.rank} failed: {said}", FAILED, (), self.topology.rank)

    def _mind_the_store(self) -> None:
        """A store whose keeper is stopped, or whose machine is gone, lets the guard wait for ever."""
        looks = 0
        while not self.closed.wait(self.beat):
            silent, still = time.monotonic() - self.heard, self.motion.still()  # a loop that moves may come to its end
            looks = looks + 1 if min(silent, still) > self.patience else 0
            if looks > BEATS_TO_LOOK:
                self._tell_of_the_store()

    def _tell_of_the_store(self) -> None:
        """End this rank: the store is lost. Its keeper is, unless ranks have drifted apart and that has killed it."""
        silent, keeper = time.monotonic() - self.heard, () if _kept_by_torchrun() else (0,)
        sights = [
            RankStatus(rank, self.places[rank][0], silent * (rank in keeper), 0.0, *self._recorded(rank))
            for rank in sorted({*self._in_view(), *keeper})
        ]
        found = judge(sights, self.topology.replicas(), 0.0, math.inf)
        told = (
            f"torchrun on {os.environ['MASTER_ADDR']}, which keeps the ranks' store, gave no sign of life for "
            f"{silent:.0f} s, at tick {self.recorder.tick}: killed, stopped, or its host is gone"
        )
        self._end(found.message if found else told, FAILED, keeper, self.topology.rank)

    def _relay(self) -> None:
        """Signals on any rank become known to all leaders."""
        if self.stop.asked and not self.relayed:
            self.store.set("stop", str(self.stop.asked))
            self.relayed = True
        elif not self.stop.asked and self.topology.is_leader and self.store.check(["stop"]):
            self.stop.asked, self.relayed = int(self.store.get("stop")), True

    def _sign(self, done: bool = False) -> None:
        """This rank lives: how often it said so, for how many ms its loop has been still, whether it is done."""
        self.beats += 1
        head = array("q", [self.beats, int(1000 * self.motion.still()), done])
        sign = head.tobytes() + self.recorder.content()
        self.store.set(f"beat/{self.topology.rank}", sign)  # type: ignore[arg-type]  # bytes are taken as they are

    def _watch(self) -> None:
        if self.store.check(["alarm"]):
            self._end(**json.loads(self.store.get("alarm")))
        if self.error and not is_symptom(self.error):
            self._alarm(*self._own_failure(self.error))
        peer = self._sight(self.peer)
        silent = 0.0 if peer.done else peer.silent
        if not (self.error or silent > self.patience or self.motion.still() > self.patience):
            self.looking_since = 0.0
            return
        now = time.monotonic()
        if not self.looking_since:  # the others weren't looked at of late
            self.looking_since, self.seen = now, {self.peer: self.seen[self.peer]}
        sights = [self._sight(rank) for rank in self._in_view()]
        if now - self.looking_since < BEATS_TO_LOOK * self.beat:
            return
        silence = (BEATS_TO_LOOK - 1) * self.beat if self.error or silent > self.patience else self.patience
        stillness = STANDSTILL * self.config.timeout if len(sights) == self.topology.world_size else math.inf
        if found := judge(sights, self.topology.replicas(), silence, stillness):
            self._alarm(found.message, FAILED, found.lost)
        if self.error and now - self.error_time > self.patience:
            self._alarm(*self._own_failure(self.error))

    def _in_view(self) -> list[int]:
        """Ranks that this one looks at: its replica's and the next one; rank 0 at all, for it tells a standstill."""
        if self.topology.rank == 0:
            return [*range(self.topology.world_size)]
        return sorted({*self.topology.replicas()[self.topology.dp_rank], self.peer})

    def _sight(self, rank: int) -> RankStatus:
        key, now = f"beat/{rank}", time.monotonic()
        sign = self.store.get(key) if self.store.check([key]) else b""
        if rank not in self.seen or self.seen[rank][0] != sign:
            self.seen[rank] = sign, now
        silent = now - self.seen[rank][1]
        if not sign:
            return RankStatus(rank, self.places[rank][0], silent, 0.0)
        _, still, done = array("q", sign[:24])
        tick, trace = traced(sign[24:])
        if silent > (BEATS_TO_LOOK - 1) * self.beat:  # what it did after its last sign of life
            last, more = self._recorded(rank)
            tick, trace = max(tick, last), trace | more
        return RankStatus(rank, self.places[rank][0], silent, still / 1000, tick, trace, bool(done))

    def _recorded(self, rank: int) -> tuple[int, Trace]:
        """A rank's last tick and digests by its recorder, if that can be had."""
        with suppress(OSError, IndexError):
            return traced(self._box(rank).read_bytes())
        return NONE, {}

    def _own_failure(self, error: BaseException) -> tuple[str, int, tuple[int, ...]]:
        """What to tell of an error of this rank's loop; that of a user needs no traceback."""
        if isinstance(error, ValueError):
            return f"{error} [{self._who(self.topology.rank)}]", USAGE, ()
        sys.stderr.write("".join(traceback.format_exception(error)))
        said = str(error).strip().split("\n")[0]
        return f"{self._who(self.topology.rank)} failed: {type(error).__name__}: {said}", FAILED, ()

    def _alarm(self, message: str, status: int, lost: tuple[int, ...]) -> None:
        """End the run, unless another rank has already said why it ends."""
        own = {"message": message, "status": status, "lost": lost, "teller": self.topology.rank}
        self._end(**json.loads(self.store.compare_set("alarm", "", json.dumps(own))))

    def _end(self, message: str, status: int, lost: tuple[int, ...], teller: int) -> None:
        """Tell, leave message and stacks in the log, take ranks along that can't end themselves, and exit."""
        if teller == self.topology.rank:
            sys.stderr.write(f"error: {message}\n")  # at one go, as several ranks may tell at once; print() isn't
            report(status)
        log.error(message)
        with suppress(OSError), open(self.logs / f"rank-{self.topology.rank}.log", "a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        with suppress(OSError, RuntimeError):
            for _, machine, pid in (self.places[rank] for rank in lost):
                if machine == _machine() and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
        if self.topology.rank == 0 and not _kept_by_torchrun():
            time.sleep(3 * self.beat)  # the store ends with this rank: first let the others read why
        os._exit(status)

    def _who(self, rank: int) -> str:
        return f"rank {rank} ({self.places[rank][0]})"

    def _box(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.recorder"


def _store(timeout: float) -> dist.Store:
    """A connection of one's own to the store of this attempt's ranks."""
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


def _machine() -> str:
    """What ranks that can see each other's processes have in common."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def is_symptom(error: BaseException) -> bool:
    """Whether something else is the cause: a peer that is gone, or one that differs."""
    lost = isinstance(error, RuntimeError) and "gloo" in str(error)
    return lost or isinstance(error, (Diverged, dist.DistError))
