import torch

from spmd.demo.sums import LIMIT
from spmd.demo.tokenizer import build_tokenizer
from spmd.demo.train import LENGTH, all_sums, answer_mask, draw, model_config


def test_rows_are_the_tokenized_sums() -> None:
    sums = all_sums()
    assert sums.shape == (LIMIT * LIMIT, LENGTH)
    tokenizer = build_tokenizer()
    for a, b in [(347, 218), (0, 0), (999, 999), (7, 95)]:
        row = sums[a * LIMIT + b].tolist()
        text = tokenizer(f"{a}+{b}={a + b}<eos>").input_ids
        assert row == text + [tokenizer.pad_token_id] * (LENGTH - len(text))


def test_only_the_answer_is_learnt() -> None:
    tokenizer = build_tokenizer()
    tokens = torch.tensor([tokenizer("7+95=102<eos><pad><pad>").input_ids])
    assert tokenizer.decode(tokens[answer_mask(tokens)]) == "102<eos>"


def test_batches_repeat_with_the_seed_and_hold_short_operands() -> None:
    none = torch.zeros(LIMIT * LIMIT, dtype=torch.bool)
    first, again = (draw(1000, none, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert ((first // LIMIT < 10) & (first % LIMIT < 10)).any()


def test_shape_divides_for_two_stages_and_two_shards() -> None:
    config = model_config()
    counts = [config.num_hidden_layers // 2, config.num_attention_heads, config.num_key_value_heads]
    assert all(count % 2 == 0 for count in [*counts, config.intermediate_size, config.vocab_size])
