"""The floor against figures worked out by hand, and by its parts."""

from dataclasses import replace
from typing import Any

import pytest

from spmd.bench.floor import Work, figures, lines, ranks_work
from spmd.bench.rates import Rates
from spmd.bench.workload import lengths
from spmd.config import Config, ModelConfig, SchedulerConfig, TopologyConfig, WorkloadConfig
from spmd.model.architecture import Architecture, GroupedQuery, LayerSpec, read_architecture
from spmd.model.cost import head_params, layer_params
from spmd.runtime.compose import CONF
from spmd.trace.account import PARTS, Account
from tests.support.settings import settled

H200 = Rates(bandwidth=4.24e12, flops=785e12)
LONG = WorkloadConfig("long_output", 128, [900, 1000], [900, 1000])
SHORT = WorkloadConfig("short_output", 64, [1024, 1024], [256, 256])


def configured(workload: WorkloadConfig, seats: int, **topology: Any) -> Config:
    scheduler = SchedulerConfig(max_num_seqs=seats)
    return Config(ModelConfig(), TopologyConfig(**topology), scheduler, workload=workload)


def architecture(name: str) -> Architecture:
    return read_architecture(str(CONF / "shapes" / name))


def work_of(arch: Architecture, config: Config, rows: list[tuple[int, int]] | None = None) -> list[Work]:
    settings = settled(config, arch)
    return ranks_work(settings, lengths(config.workload, arch.vocab_size) if rows is None else rows)


@pytest.mark.parametrize(
    ("model", "config", "known"),
    [
        ("qwen3_8b", configured(LONG, 128), 10470),
        ("qwen3_8b", configured(LONG, 128, pp=2), 16210),
        ("qwen3_8b", configured(SHORT, 8), 1790),
        ("qwen3_8b", configured(SHORT, 16, pp=2), 3580),
    ],
)
def test_known_floors_on_an_h200(model: str, config: Config, known: float) -> None:
    arch = architecture(model)
    output = sum(tokens for _, tokens in lengths(config.workload, arch.vocab_size))
    floor = output / max(work.seconds(H200) for work in work_of(arch, config))
    assert floor == pytest.approx(known, rel=0.1)


def test_one_request_by_hand() -> None:
    arch = replace(architecture("tiny"), layers=(LayerSpec(), LayerSpec(GroupedQuery(5))) * 4)
    (work,) = work_of(arch, configured(LONG, 4), [(10, 4)])
    layers = sum(layer_params(arch, layer) for layer in range(8))
    assert work.weight_bytes == 3 * 4 * (layers + head_params(arch)), "three decode steps of float32"
    seen = 4 * (11 + 12 + 13) + 4 * (5 + 5 + 5)
    assert work.cache_bytes == seen * 2 * arch.num_kv_heads * arch.head_dim * 4
    assert work.decode_flops == 2 * 3 * (layers + head_params(arch))
    pairs = 4 * 55 + 4 * (1 + 2 + 3 + 4 + 5 * 6)
    products = 4 * arch.num_heads * arch.head_dim * pairs
    assert work.prefill_flops == 2 * (10 * layers + head_params(arch)) + products
    assert work.bytes == work.weight_bytes + work.cache_bytes


def test_decode_takes_as_long_as_its_seats_and_its_longest_row_need() -> None:
    arch = architecture("tiny")
    per_turn = work_of(arch, configured(LONG, 1), [(1, 2)])[0].weight_bytes
    turns = {
        (4, ((1, 11),) * 4): 10,
        (4, ((1, 11),) * 8): 20,
        (4, ((1, 11),) * 3 + ((1, 31),)): 30,
        (4, ((1, 1),) * 4): 0,  # the prompt yields the only token
    }
    for (seats, rows), expected in turns.items():
        (work,) = work_of(arch, configured(LONG, seats), list(rows))
        assert work.weight_bytes == pytest.approx(expected * per_turn)


def test_stages_share_the_work_and_tensor_ranks_split_it() -> None:
    arch, rows = architecture("qwen3_8b"), [(100, 20)] * 8
    (whole,) = work_of(arch, configured(LONG, 8), rows)
    (half,) = work_of(arch, configured(LONG, 8, tp=2), rows)
    first, last = work_of(arch, configured(LONG, 8, pp=2, layers=[20, 16]), rows)
    for name in ("weight_bytes", "cache_bytes", "decode_flops", "prefill_flops"):
        share = 2 if name == "weight_bytes" else 1  # each of a turn's two micro-batches reads the weights
        assert getattr(whole, name) == pytest.approx(2 * getattr(half, name))
        assert getattr(first, name) + getattr(last, name) == pytest.approx(share * getattr(whole, name))
    assert first.cache_bytes / last.cache_bytes == pytest.approx(20 / 16)


def test_replicas_get_rows_in_turn_and_one_may_have_none() -> None:
    arch = architecture("tiny")
    rows = [(10, 5), (20, 9), (30, 3)]
    dealt = work_of(arch, configured(LONG, 4, dp=2), rows)
    assert dealt == [work_of(arch, configured(LONG, 4), share)[0] for share in ([rows[0], rows[2]], [rows[1]])]
    assert len(work_of(arch, configured(LONG, 4, dp=2), rows[:1])) == 1


def test_more_rows_touch_more_experts() -> None:
    arch = architecture("qwen3_30b_a3b")
    one, many = (work_of(arch, configured(LONG, 64), [(10, 5)] * rows)[0] for rows in (1, 64))
    experts = 3 * arch.hidden_size * arch.moe_intermediate_size * arch.num_layers * arch.dtype.itemsize * 4
    assert many.weight_bytes - one.weight_bytes == pytest.approx((128 - 8) * experts, rel=0.03)
    assert many.decode_flops == 64 * one.decode_flops


def test_products_bound_decode_where_they_take_longer_than_weights() -> None:
    work = Work(weight_bytes=10.0, cache_bytes=4.0, decode_flops=30.0, prefill_flops=8.0)
    assert work.seconds(Rates(bandwidth=2.0, flops=100.0)) == pytest.approx(5 + 2 + 0.08)
    assert work.seconds(Rates(bandwidth=2.0, flops=2.0)) == pytest.approx(15 + 2 + 4)


def test_figures_and_their_lines() -> None:
    work = [Work(6e9, 2e9, 0.0, 1e12), Work(8e9, 4e9, 0.0, 0.0)]
    rates = Rates(4e9, 1e12)
    found = figures(work, rates, seconds=6.0, output_tokens=300, accounts=[])
    assert found == {
        "stage_floor_percent": [],
        "floor_output_throughput": 100.0,
        "floor_percent": 50.0,
        "achieved_bandwidth": 2e9,
        "device_bandwidth": 4e9,
        "device_flops": 1e12,
    }
    assert lines(found) == [("floor", "100.0 tok/s", "50.0 % reached"), ("read", "2.0 GB/s", "of 4.0 GB/s")]
    unknown = figures(work, None, seconds=6.0, output_tokens=300, accounts=[])
    assert unknown == dict.fromkeys(found) | {"achieved_bandwidth": 2e9}
    assert lines(unknown) == [("read", "2.0 GB/s")]


def test_what_the_floor_is_not_is_told_part_by_part() -> None:
    """Two replicas of two stages, in ten seconds; a stage's account is the sum over its ranks."""
    work = [Work(8e9, 0.0, 0.0, 0.0), Work(20e9, 0.0, 0.0, 0.0), Work(16e9, 0.0, 0.0, 0.0), Work(20e9, 0.0, 0.0, 0.0)]
    parts = dict.fromkeys(PARTS, 0.0)
    accounts = [
        Account(parts | {"forward": 8.0, "hidden_wait": 10.0, "idle_tail": 2.0}),
        Account(parts | {"forward": 14.0, "sample": 1.0, "padding": 1.0, "host": 4.0}),
    ]
    found = figures(work, Rates(4e9, 1e12), 10.0, 300, accounts)
    first, second = found["stage_floor_percent"]
    assert {part: share for part, share in first.items() if share} == pytest.approx(
        {"floor": 30.0, "slower": 10.0, "hidden_wait": 50.0, "idle_tail": 10.0}
    )
    assert {part: share for part, share in second.items() if share} == pytest.approx(
        {"floor": 50.0, "slower": 25.0, "padding": 5.0, "host": 20.0}
    )
    assert found["floor_percent"] == second["floor"], "the slowest stage's"


def test_replicas_that_share_experts_read_their_own_alone() -> None:
    arch = architecture("qwen3_30b_a3b")
    rows = [(10, 101)] * 128
    (apart, *_), (shared, *_) = (work_of(arch, configured(LONG, 64, dp=2, ep=ep), rows) for ep in (False, True))
    experts = arch.num_layers * arch.num_experts * 3 * arch.hidden_size * arch.moe_intermediate_size
    saved = (apart.weight_bytes - shared.weight_bytes) / 100 / arch.dtype.itemsize  # a decode step
    assert saved == pytest.approx(experts / 2, rel=0.05), "64 rows touch nearly all experts, 128 as good as all"
    assert apart.prefill_flops == shared.prefill_flops
