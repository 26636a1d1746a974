"""Ranks that drift apart, die, fall silent or fail: the run ends soon, and says which rank, at which tick, and why."""

import os
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spmd.config import Config, GuardConfig
from spmd.engine import Engine
from spmd.messages import Mistake
from spmd.parallel.packet import Packet, PacketWire
from tests.support.driver import configure, drive
from tests.support.oracle import Task
from tests.support.ranks import RankFailure, Ranks

AT = 12  # the tick from which something is wrong
SLOW_MS = 3.0


def no_admission(engine: Engine) -> None:
    """The plan is another: from now on it admits nobody."""
    engine.replicas.admits = lambda *_: False  # type: ignore[method-assign]


def lost_block(engine: Engine) -> None:
    engine.scheduler.pool.pop()
    engine.scheduler.check = lambda *_: None  # type: ignore[method-assign]  # the test's own would notice first


def other_token(engine: Engine) -> None:
    """The next packet with tokens reaches this rank with another one."""
    receive = PacketWire.receive
    spoilt: list[int] = []

    def spoil(self: PacketWire) -> Packet:
        packet = receive(self)
        if packet.tokens and not spoilt:
            spoilt.append(packet.tokens[0])
            packet.tokens[0] ^= 1
        return packet

    PacketWire.receive = spoil  # type: ignore[method-assign]


def fails(engine: Engine) -> None:
    raise RuntimeError("out of memory, say")


def user_error(engine: Engine) -> None:
    raise Mistake("output=x: the disk is full")


def foreign_error(engine: Engine) -> None:
    raise ValueError("Out of range float values are not JSON compliant")


def stopped(engine: Engine) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def killed(engine: Engine) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def go_wrong(rank: int, config: Config, culprit: int, wrong: Callable[[Engine], None], port: int = 0) -> None:
    """`port`: where rank 0 keeps the ranks' store, as it does without torchrun; 0: the test's process does."""
    if port:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    t, ticked = config.topology, Engine.tick

    def tick(self: Engine, tick: int) -> None:
        if rank == culprit and tick == AT:
            wrong(self)
        ticked(self, tick)

    Engine.tick = tick  # type: ignore[method-assign]  # for good: the process ends with the run
    drive(rank, config, [SLOW_MS] * (t.dp * t.pp * t.tp))


DRIFTS = [
    ((1, 2, 1), 0, no_admission, "requests"),
    ((1, 1, 2), 1, no_admission, "requests"),
    ((1, 2, 2), 2, no_admission, "requests"),
    ((2, 2, 1), 2, no_admission, "requests"),
    ((1, 2, 1), 0, lost_block, "blocks"),
    ((1, 2, 1), 0, other_token, "tokens"),
]


@pytest.mark.parametrize(("topology", "culprit", "wrong", "field"), DRIFTS)
def test_ranks_that_drift_apart_are_named_with_tick_and_field(
    last_words: Callable[..., list[str]],
    topology: tuple[int, int, int],
    culprit: int,
    wrong: Callable[[Engine], None],
    field: str,
) -> None:
    for words in last_words(topology, culprit, wrong):
        found = re.search(r"drifted apart: at tick (\d+) .*, first in '(\w+)'", words)
        assert found, words
        assert int(found[1]) >= AT and found[2] == field
        if topology[1] * topology[2] > 2:
            assert f"rank {culprit} (dp" in words and "differs from the other 3 of its replica" in words
        else:
            assert re.search(rf"rank {culprit} \(dp.* differ,", words)


@pytest.mark.parametrize("wrong", [stopped, killed])
@pytest.mark.parametrize(("topology", "culprit", "keeps_store"), [((2, 2, 1), 3, False), ((1, 2, 1), 0, True)])
def test_a_lost_rank_ends_the_run_and_is_named(
    last_words: Callable[..., list[str]],
    topology: tuple[int, int, int],
    culprit: int,
    keeps_store: bool,
    wrong: Callable[[Engine], None],
) -> None:
    for words in last_words(topology, culprit, wrong, free_port() if keeps_store else 0):
        assert re.search(rf"rank {culprit} \(dp.*pid \d+\) gave no sign of life for \d+ s, at tick {AT - 1}", words)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (fails, r"\) failed: RuntimeError: out of"),
        (foreign_error, r"\) failed: ValueError: Out of range"),
        (user_error, r"(?m)^output=x: the disk is full \[rank 1"),
    ],
)
def test_a_rank_that_fails_says_why_for_all(
    last_words: Callable[..., list[str]], wrong: Callable[[Engine], None], said: str
) -> None:
    for words in last_words((1, 2, 1), 1, wrong):
        assert re.search(said, words) and "rank 1 (dp0/pp1/tp0" in words


@pytest.fixture
def last_words(ranks: Ranks, task: Callable[[str], Task], tmp_path: Path) -> Callable[..., list[str]]:
    """Runs until it ends, and returns what those ranks that could left in their logs; each must leave its stacks."""

    def run(topology: tuple[int, int, int], culprit: int, wrong: Callable[[Engine], None], port: int = 0) -> list[str]:
        solved, size = task("qwen3"), topology[0] * topology[1] * topology[2]
        config = configure(solved.model, solved.input, str(tmp_path), topology, max_num_seqs=2)
        config = replace(config, guard=GuardConfig(timeout=2.5))
        with pytest.raises(RankFailure, match="it ended with exit code"):
            ranks.run(size, go_wrong, config, culprit, wrong, port, grace=20.0)
        logs = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in range(size)]
        ended = [log for log in logs if "most recent call first" in log]
        assert ended
        return ["\n".join(re.findall("ERROR (.*)", log)) for log in ended]

    return run


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
