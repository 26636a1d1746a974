from spmd.bench.balance import balance_rows


def test_every_way_to_share_and_every_gate_is_simulated() -> None:
    head, *lines = (line.split() for line in balance_rows(2, 80))
    assert head[:3] == ["share", "gate", "lag"]
    assert {line[0] for line in lines} == {"static", "dynamic"}
    assert {line[1] for line in lines} == {"off", "saturated", "near", "interval"}
    assert all(int(line[3].replace(",", "")) > 100 for line in lines)
