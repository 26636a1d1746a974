"""torchrun, with the exit code of what it ran and one line instead of its tracebacks:

python launch/torchrun.py --standalone --nproc-per-node 2 -m spmd.generate topology=pp2 …

Takes torchrun's arguments. Ends with 0 (done), 75 (stopped by a signal: start again to go on), 2 (a mistake of the
user's, who was told) or 1 (a rank crashed); torchrun itself always ends with 1. A signal goes to all ranks of this
machine, USR1 too. The ranks leave their code in the file $SPMD_STATUS, for when torchrun doesn't see how they end.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

CRASH, USAGE, STOPPED = 1, 2, 75
HOME = Path(__file__).resolve().parents[1]
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
GOOD = {STOPPED, *(-stop for stop in STOPS)}  # of a rank that ended because it was told to
NODE = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
TAIL = 20  # lines of a crashed rank's stderr, if only its log has them


def main(arguments: list[str]) -> int:
    """Run a node's ranks to their end; the exit code."""
    for number in STOPS:  # until the ranks are started, when torchrun's own handlers take over
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    forwarded = [name for name in FORWARDED if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]  # by nohup
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(forwarded))
    os.environ.update(import_path(os.environ))
    with tempfile.TemporaryDirectory(prefix="spmd-") as folder:
        os.environ.setdefault("PET_LOG_DIR", folder)  # torchrun would leave a folder behind
        status = Path(os.environ.setdefault("SPMD_STATUS", f"{folder}/status"))
        status.unlink(missing_ok=True)
        return _run(arguments, status)


def import_path(environ: Mapping[str, str]) -> dict[str, str]:
    """What has ranks import this checkout and their libraries, never a random.py of the folder they are started in.

    An empty part of PYTHONPATH stands for that folder, as "python -m" does without PYTHONSAFEPATH.
    """
    parts = [str(HOME), *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(parts))}


def _run(arguments: list[str], status: Path) -> int:
    with _quiet():
        from torch.distributed import DistError, run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
    try:
        run.main(arguments)
    except SignalException:
        reported = status.read_text() if status.exists() else ""
        return int(reported or STOPPED)
    except ChildFailedError as failed:
        return _report(failed.failures)
    except (RendezvousError, DistError) as error:
        if signal.getsignal(signal.SIGTERM) is _stop:
            why = str(error.__cause__ or error).splitlines()[0]
            _tell(f"error: {NODE} can't meet the other nodes: {why}")
            return CRASH
        _tell(f"{NODE}: another node has ended, so have the ranks here")
        return STOPPED  # why it did is for that node to say
    return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(STOPPED)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Import torch such that what it logs in this process, but not in the ranks, is left out; LOGLEVEL=… shows it.

    When one node ends, torchrun on the others logs pages about a connection that broke.
    """
    level = "TORCH_CPP_LOG_LEVEL"
    if "LOGLEVEL" in os.environ or level in os.environ:
        yield
        return
    logging.disable(logging.ERROR)
    os.environ[level] = "ERROR"
    yield
    del os.environ[level]


def _report(failures: Mapping[int, Any]) -> int:
    """Say which rank crashed, if one did; the exit code. The others' ends follow from its own."""
    if any(failure.exitcode == USAGE for failure in failures.values()):
        for log in Path(os.environ["PET_LOG_DIR"]).glob("*/attempt_*/[1-9]*/stderr.log"):  # not on the terminal
            for line in log.read_text(errors="replace").splitlines():
                if line.startswith("error: "):
                    _tell(line)
        return USAGE
    crashed = {rank: failure for rank, failure in failures.items() if failure.exitcode not in GOOD}
    if not crashed:
        return STOPPED
    rank, first = min(crashed.items(), key=lambda item: (item[1].timestamp, item[1].exitcode > 0))
    code = first.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    _tell(f"error: rank {rank} {how} (local rank {first.local_rank} on {NODE}, pid {first.pid})")
    if first.local_rank == 0:
        return CRASH  # its stderr is on the terminal
    for log in Path(os.environ["PET_LOG_DIR"]).glob(f"*/attempt_*/{first.local_rank}/stderr.log"):
        lines = log.read_text(errors="replace").splitlines()
        _tell("\n".join([f"the end of {log}:", *lines[-TAIL:]]))
    return CRASH


def _tell(text: str) -> None:
    """On stderr, if anybody is still there to read it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(ended)  # a signal during torchrun's own cleaning up leaves threads that a plain exit would wait for
