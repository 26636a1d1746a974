import torch

from spmd.demo.sums import LIMIT, held_out, is_held_out, prompt
from spmd.demo.train import draw


def test_split_holds_out_both_orders_of_two_percent() -> None:
    pairs = held_out()
    assert len(pairs) == len(set(pairs)) == sum(is_held_out(a, b) for a in range(LIMIT) for b in range(LIMIT))
    assert 0.018 < len(pairs) / LIMIT**2 < 0.022
    assert {(b, a) for a, b in pairs} == set(pairs)


def test_split_never_changes() -> None:
    """The shipped checkpoint was trained on the rest of exactly this split."""
    assert len(held_out()) == 20043
    assert is_held_out(555, 589) and not is_held_out(347, 218)


def test_training_never_draws_a_held_out_pair() -> None:
    is_test = torch.zeros(LIMIT * LIMIT, dtype=torch.bool)
    is_test[[a * LIMIT + b for a, b in held_out()]] = True
    rows = torch.cat([draw(2048, is_test, torch.Generator().manual_seed(seed)) for seed in range(20)])
    assert len(rows) > 0.97 * 20 * 2048
    assert not any(is_held_out(*divmod(row, LIMIT)) for row in rows.tolist())


def test_prompts_carry_no_padding() -> None:
    assert prompt(7, 95) == "7+95="
