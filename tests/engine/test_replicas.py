"""Replicas that share one list: the tokens are right, and all ranks exchange as often and end at the same tick."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spmd.config import BalanceConfig
from tests.support.driver import Report, answers, configure, drive, run
from tests.support.jobs import write_rows
from tests.support.oracle import Task
from tests.support.ranks import Ranks

TOPOLOGIES = {"dp2": (2, 1, 1), "dp4": (4, 1, 1), "dp2pp2": (2, 2, 1), "dp2tp2": (2, 1, 2)}
MODELS = {"dense": ("qwen3", False), "experts": ("qwen3_moe", False), "shared_experts": ("qwen3_moe", True)}
GATES = {"off": {}, "saturated": {"patience": 5}, "near": {"patience": 3}, "interval": {"interval": 3}}
BALANCES = {
    "dynamic": BalanceConfig(),
    "lockstep": BalanceConfig(lag=0),
    "saturated": BalanceConfig(gate="saturated", patience=5),
    "near": BalanceConfig(gate="near", patience=3),
    "interval": BalanceConfig(gate="interval", interval=3),
    "static": BalanceConfig(share="static"),
    "static_saturated": BalanceConfig(share="static", gate="saturated"),
}


Solved = Callable[[str], Task]


@pytest.fixture
def qwen3(task: Solved) -> Task:
    return task("qwen3")


def rows_of(reports: list[Report], topology: tuple[int, int, int]) -> list[int]:
    """Rows answered by each replica."""
    dp, pp, tp = topology
    return [len(reports[(replica * pp + pp - 1) * tp].answers) for replica in range(dp)]


def combinations() -> list[tuple[str, str]]:
    """Every balance on two topologies, the two that differ most on all."""
    return [
        (t, b) for t in TOPOLOGIES for b in BALANCES if t in ("dp2", "dp2pp2") or b in ("dynamic", "static_saturated")
    ]


@pytest.mark.parametrize(("topology", "balance"), combinations())
def test_balance_changes_no_token(ranks: Ranks, qwen3: Task, tmp_path: Path, topology: str, balance: str) -> None:
    config = configure(
        qwen3.model, qwen3.input, str(tmp_path), TOPOLOGIES[topology], balance=BALANCES[balance], max_num_seqs=2
    )
    reports = run(ranks, config)
    assert answers(reports) == qwen3.answers
    assert min(rows_of(reports, TOPOLOGIES[topology])) > 1
    assert config.balance.gate or not any(report.frozen_ticks for report in reports)


@pytest.mark.full
@pytest.mark.parametrize("share", ["dynamic", "static"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("model", MODELS)
def test_every_gate_and_way_to_share_on_every_topology(
    ranks: Ranks, task: Solved, tmp_path: Path, model: str, topology: str, gate: str, share: str
) -> None:
    name, ep = MODELS[model]
    balance = BalanceConfig(share=share, gate=gate, **GATES[gate])
    solved, seats = task(name), TOPOLOGIES[topology][1] * 2
    run_dir, chosen = str(tmp_path), TOPOLOGIES[topology]
    config = configure(solved.model, solved.input, run_dir, chosen, balance=balance, ep=ep, max_num_seqs=seats)
    assert answers(run(ranks, config)) == solved.answers


def random_runs(number: int, seed: int = 0) -> list[Any]:
    """The first few are enough for a plain run."""
    rng = random.Random(seed)
    runs = [
        (
            rng.choice([*MODELS]),
            rng.choice([*TOPOLOGIES]),
            BalanceConfig(
                share=rng.choice(["dynamic", "dynamic", "static"]),
                gate=rng.choice(["off", "saturated", "near", "interval"]),
                patience=rng.choice([1, 8]),
                lag=rng.randrange(6),
            ),
            {
                "max_num_seqs": rng.randint(2, 8),
                "async_depth": rng.randrange(2),
                "lookahead": rng.randrange(2),
                "prefill": rng.choice(["mixed", "exclusive"]),
                "policy": rng.choice(["fcfs", "priority"]),
                "num_blocks": rng.choice([None, 18]),
            },
            tuple(rng.choice([0.0, 1.0, 4.0]) for _ in range(4)),
        )
        for _ in range(number)
    ]
    return [pytest.param(*run, marks=[pytest.mark.full] if index >= 4 else []) for index, run in enumerate(runs)]


@pytest.mark.parametrize(("model", "topology", "balance", "options", "delays_ms"), random_runs(100))
def test_as_many_exchanges_on_every_rank_whoever_is_late(
    ranks: Ranks,
    task: Solved,
    tmp_path: Path,
    model: str,
    topology: str,
    balance: BalanceConfig,
    options: dict[str, Any],
    delays_ms: tuple[float, ...],
) -> None:
    """`run` compares the counts; what each replica plans is the same without delays."""
    name, ep = MODELS[model]
    solved, run_dir, chosen = task(name), str(tmp_path), TOPOLOGIES[topology]
    config = configure(solved.model, solved.input, run_dir, chosen, balance=balance, ep=ep, **options)
    late, prompt = run(ranks, config, drive, delays_ms), run(ranks, config)
    assert answers(late) == answers(prompt) == solved.answers
    assert [report.ticks for report in late] == [report.ticks for report in prompt]


@pytest.mark.parametrize("share", ["dynamic", "static"])
@pytest.mark.parametrize(("dp", "rows"), [(2, 1), (4, 3), (3, 7)])
def test_a_list_shorter_than_the_replicas(
    ranks: Ranks, qwen3: Task, tmp_path: Path, dp: int, rows: int, share: str
) -> None:
    lines = Path(qwen3.input).read_text().splitlines(keepends=True)[:rows]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    balance = BalanceConfig(share=share)
    reports = run(ranks, configure(qwen3.model, f"{tmp_path}/few.jsonl", str(tmp_path), (dp, 1, 1), balance=balance))
    assert answers(reports) == {f"greedy-{row}": qwen3.answers[f"greedy-{row}"] for row in range(rows)}
    assert rows_of(reports, (dp, 1, 1)) == [len(range(replica, rows, dp)) for replica in range(dp)]


@pytest.mark.parametrize("lengths", [[100, *[1] * 11], [24, 1] * 6], ids=["one is long", "every second one is long"])
@pytest.mark.parametrize("share", ["dynamic", "static"])
@pytest.mark.parametrize("model", ["dense", "shared_experts"])
def test_most_of_the_work_on_one_replica(
    ranks: Ranks, task: Solved, tmp_path: Path, model: str, share: str, lengths: list[int]
) -> None:
    name, ep = MODELS[model]
    rows = [json.loads(line) for line in Path(task(name).input).read_text().splitlines()]
    uneven = [row | {"max_tokens": length, "ignore_eos": True} for row, length in zip(rows, lengths, strict=False)]
    write_rows(tmp_path / "in.jsonl", uneven)

    def answered(dp: int, **options: Any) -> dict[str, Any]:
        config = configure(task(name).model, f"{tmp_path}/in.jsonl", str(tmp_path), (dp, 1, 1), **options)
        return answers(run(ranks, config))

    assert answered(2, balance=BalanceConfig(share=share), ep=ep, max_num_seqs=2) == answered(1)


@pytest.mark.parametrize(
    ("seats", "gate"), [(1, "saturated"), (1, "interval"), (2, "saturated"), (2, "near"), (2, "interval")]
)
def test_few_seats_behind_a_gate(ranks: Ranks, qwen3: Task, tmp_path: Path, seats: int, gate: str) -> None:
    balance = BalanceConfig(gate=gate)
    config = configure(qwen3.model, qwen3.input, str(tmp_path), (3, 1, 1), balance=balance, max_num_seqs=seats)
    assert answers(run(ranks, config)) == qwen3.answers


def test_one_replica_exchanges_nothing(ranks: Ranks, qwen3: Task, tmp_path: Path) -> None:
    balance = BalanceConfig(gate="saturated", patience=1)
    config = configure(qwen3.model, qwen3.input, str(tmp_path), (1, 2, 1), balance=balance)
    reports = run(ranks, config)
    assert answers(reports) == qwen3.answers
    assert [report.exchanges for report in reports] == [None, None]
    assert [report.frozen_ticks for report in reports] == [0, 0]
