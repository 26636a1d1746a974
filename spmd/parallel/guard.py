"""The lockstep guard: a thread beside the loop that ends this rank, in bounded time, when the run can't go on.

Each rank leaves a sign of life in torchrun's store once a beat, with what its recorder holds, and looks at that of the
next rank. Whoever finds something wrong looks at more of them, and the first verdict ends the whole run: one rank
prints it, all write it and their stacks to their logs. Signals to stop reach the leaders the same way.
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
from spmd.parallel.recorder import Recorder, traced
from spmd.parallel.verdict import Sight, judge
from spmd.schedule.trail import Diverged
from spmd.signals import Stop, report
from spmd.topology import Topology

BEAT = 1.0  # seconds between signs of life, at most
BEATS_TO_LOOK = 4  # for which a suspicion must last, and a rank's silence while it does
WAITS = 0.6  # of the timeout until silence or stillness is suspicious; the rest is for looking and for telling
STANDSTILL = 4.0  # timeouts until a run ends in which nobody is lost and nothing differs, but nothing moves either
BUSY = 0.1  # of a beat, the processor time that makes a CPU rank one that computes
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
        self.closing = threading.Event()
        self.error: BaseException | None = None  # the loop's
        self.error_time = 0.0
        self.motion = Motion(self.recorder, computes)
        self.places: dict[int, tuple[str, str, int]] = {}
        self.seen: dict[int, tuple[bytes, float]] = {}  # of ranks: the latest sign of life, and when it was new
        self.looking_since = 0.0  # 0: nothing is suspicious
        self.relayed = False

    def __enter__(self) -> "Guard":
        t = self.topology
        place = f"{t}, {socket.gethostname()}, pid {os.getpid()}"
        self.store.set(f"who/{t.rank}", json.dumps([place, _machine(), os.getpid()]))
        self._sign()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self.config.enabled:
            self.closing.set()
            self.join()
            self._sign(done=True)
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
            except Exception as error:
                log.exception("the guard failed")
                if self.config.enabled:
                    said = str(error).split("\n")[0]
                    self._end(f"the guard of rank {self.topology.rank} failed: {said}", FAILED, (), self.topology.rank)

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

    def _sight(self, rank: int) -> Sight:
        key, now = f"beat/{rank}", time.monotonic()
        sign = self.store.get(key) if self.store.check([key]) else b""
        if rank not in self.seen or self.seen[rank][0] != sign:
            self.seen[rank] = sign, now
        silent = now - self.seen[rank][1]
        if not sign:
            return Sight(rank, "never seen", silent, 0.0)
        _, still, done = array("q", sign[:24])
        tick, trace = traced(sign[24:])
        if silent > (BEATS_TO_LOOK - 1) * self.beat:  # what it did after its last sign of life
            with suppress(OSError, IndexError):
                last, more = traced(self._box(rank).read_bytes())
                tick, trace = max(tick, last), trace | more
        return Sight(rank, self._place(rank)[0], silent, still / 1000, tick, trace, bool(done))

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
            print(f"error: {message}", file=sys.stderr, flush=True)
            report(status)
        log.error(message)
        with suppress(OSError), open(self.logs / f"rank-{self.topology.rank}.log", "a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        with suppress(OSError, RuntimeError):
            for place, machine, pid in map(self._place, lost):
                if place and machine == _machine() and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
        if self.topology.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(3 * self.beat)  # the store ends with this rank: first let the others read why
        os._exit(status)

    def _who(self, rank: int) -> str:
        return f"rank {rank} ({self._place(rank)[0]})"

    def _place(self, rank: int) -> tuple[str, str, int]:
        """Role, host and process for people; machine; process."""
        if rank not in self.places:
            if not self.store.check([f"who/{rank}"]):
                return "never seen", "", 0
            place, machine, pid = json.loads(self.store.get(f"who/{rank}"))
            self.places[rank] = place, machine, pid
        return self.places[rank]

    def _box(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.recorder"


class Motion:
    """For how long a loop has neither ended a tick nor, on a CPU, computed."""

    def __init__(self, recorder: Recorder, computes: bool) -> None:
        """To be made in the loop's thread."""
        self.recorder = recorder
        self.clock = time.pthread_getcpuclockid(threading.get_ident()) if computes else None
        self.moved, self.tick, self.used = time.monotonic(), recorder.tick, 0.0

    def still(self) -> float:
        """Seconds, as far as seen by calls of this."""
        now = time.monotonic()
        used = time.clock_gettime(self.clock) if self.clock is not None else 0.0
        if self.tick != self.recorder.tick or used - self.used > BUSY * BEAT:
            self.moved, self.tick, self.used = now, self.recorder.tick, used
        return now - self.moved


def _store(timeout: float) -> dist.Store:
    """A connection of one's own to the store of this attempt's ranks."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=max(1.0, timeout * (1 - WAITS) / 2))
    try:
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
    except dist.DistError as error:
        raise ValueError(f"the ranks' store at {host}:{port} can't be reached: {error}") from error
    return dist.PrefixStore(f"guard/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _machine() -> str:
    """What ranks that can see each other's processes have in common."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def is_symptom(error: BaseException) -> bool:
    """Whether something else is the cause: a peer that is gone, or one that differs."""
    lost = isinstance(error, RuntimeError) and "gloo" in str(error)
    return lost or isinstance(error, (Diverged, dist.DistError))
