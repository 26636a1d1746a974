import pytest

from spmd.bench.host import measure


@pytest.mark.parametrize(("pp", "lookahead"), [(1, 0), (2, 0), (1, 1), (2, 1)])
def test_every_decode_tick_is_measured_whole_and_in_parts(pp: int, lookahead: int) -> None:
    seconds = measure(running=8, tokens=40, pp=pp, lookahead=lookahead)
    whole = seconds.pop("tick")
    always = {"receive", "commit", "feed", "schedule", "inputs", "greedy", "judge", "post"}
    assert set(seconds) == always | ({"feedback"} if lookahead else set())
    assert len(whole) > 300
    for tick, *parts in zip(whole, *seconds.values(), strict=True):
        assert 0 < sum(parts) < tick
