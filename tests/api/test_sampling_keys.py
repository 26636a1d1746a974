from typing import Any

import pytest

from spmd.api.sampling_keys import NEUTRAL, check_sampling, default_sampling, eos_tokens, random_stream, sampling_params
from spmd.config import SamplingConfig
from spmd.schedule.request import SamplingParams

VOCAB = 100


def build(values: dict[str, Any], available: int = 50) -> SamplingParams:
    return sampling_params(NEUTRAL | check_sampling(values, VOCAB), available, ())


def test_row_then_config_then_generation_config_then_neutral() -> None:
    generation_config = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 20, "do_sample": False}
    defaults = default_sampling(generation_config, SamplingConfig(top_p=0.8, stop=["x"]), VOCAB)
    assert (defaults["temperature"], defaults["top_p"], defaults["top_k"], defaults["max_tokens"]) == (0.6, 0.8, 0, 20)
    values = defaults | check_sampling({"temperature": 0.1, "stop": []}, VOCAB)
    params = sampling_params(values, 50, ())
    assert (params.temperature, params.top_p, params.stop, params.max_tokens) == (0.1, 0.8, (), 20)


def test_neutral_defaults_are_those_of_sampling_params() -> None:
    params, plain = build({}), SamplingParams()
    names = NEUTRAL.keys() - {"n", "seed", "max_tokens"}
    assert all(getattr(params, name) == getattr(plain, name) for name in names)
    assert params.max_tokens == 50


def test_defaults_out_of_range_name_where_they_stand() -> None:
    with pytest.raises(ValueError, match=r"sampling\.temperature=-1 must be at least 0"):
        default_sampling({}, SamplingConfig(temperature=-1), VOCAB)
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p=2"):
        default_sampling({"top_p": 2}, SamplingConfig(), VOCAB)


def test_conversions() -> None:
    values = {"stop": "x", "top_k": -1, "logit_bias": {"7": 1, "3": -2.5}, "max_tokens": 8.0, "stop_token_ids": [9]}
    params = build(values)
    assert (params.stop, params.top_k, params.logit_bias) == (("x",), 0, ((3, -2.5), (7, 1.0)))
    assert (params.max_tokens, params.stop_token_ids) == (8, (9,))


def test_temperature_near_zero_is_raised_and_zero_is_greedy() -> None:
    assert build({"temperature": 1e-6}).temperature == 0.01
    assert build({"temperature": 0}).greedy


def test_eos_tokens_of_config_and_tokenizer() -> None:
    class Tokenizer:
        eos_token_id = 5

    assert eos_tokens({"eos_token_id": 2}, None, VOCAB) == (2,)
    assert eos_tokens({"eos_token_id": [7, 2, VOCAB]}, Tokenizer(), VOCAB) == (2, 5, 7)
    assert eos_tokens({}, None, VOCAB) == ()


def test_random_streams_depend_on_seed_id_and_choice_alone() -> None:
    streams = {random_stream(seed, custom_id, choice) for seed in (0, 1) for custom_id in "ab" for choice in (0, 1)}
    assert len(streams) == 8 and all(0 <= stream < 2**64 for stream in streams)
    assert random_stream(0, "row-0", 0) == 14464040951545777656  # no run, machine or version may change it


@pytest.mark.parametrize("key", ["temperature", "top_p", "repetition_penalty", "max_tokens", "seed", "n", "logprobs"])
@pytest.mark.parametrize("value", [True, "1", [1], {}, float("nan"), float("inf"), -(10**400)])
def test_wrong_types_and_numbers_that_are_none(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        check_sampling({key: value}, VOCAB)
