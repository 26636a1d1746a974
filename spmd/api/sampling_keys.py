"""Sampling parameters of a row: which keys there are, what each may be, and where a missing one comes from.

A value is looked up in the row, then in `sampling.*` of the configuration, then in the model's generation_config.json,
then in vLLM's neutral defaults. Keys and ranges are those of vLLM's OpenAI server. As in vLLM, `do_sample` of
generation_config.json is not looked at (`temperature: 0` asks for greedy), its `max_new_tokens` is the default
of max_tokens, and a temperature between 0 and 0.01 is raised to 0.01, below which logits overflow.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from spmd.config import SamplingConfig
from spmd.integers import digest64
from spmd.messages import show
from spmd.schedule.request import SamplingParams

NEUTRAL: dict[str, Any] = {
    "max_tokens": None,  # as many as fit behind the prompt
    "min_tokens": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": (),
    "logprobs": None,
    "n": 1,
    "seed": 0,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
}
FROM_GENERATION_CONFIG = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # as vLLM
MIN_TEMPERATURE = 0.01
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
LARGEST = 1e30  # of numbers that vLLM doesn't bound; finite in float32


def boolean(key: str, value: Any) -> bool:
    """Check a flag."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, not {show(value)}")
    return value


def number(low: float, high: float = LARGEST, above: bool = False) -> Callable[[str, Any], float]:
    """A check for a finite number in [low, high], or (low, high] if `above`."""

    def check(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} must be a number, not {show(value)}")
        if value < low or (above and value == low):
            raise ValueError(f"{key}={show(value)} must be {'above' if above else 'at least'} {low:g}")
        if not value <= high:
            raise ValueError(f"{key}={show(value)} must be at most {high:g}")
        return float(value)

    return check


def integer(low: int, high: int = INT64_MAX) -> Callable[[str, Any], int]:
    """A check for an integer in [low, high]; 64.0 passes for 64, as data frames like to write it."""

    def check(key: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} must be an integer, not {show(value)}")
        if value < low:
            raise ValueError(f"{key}={show(value)} must be at least {low}")
        if value > high:
            raise ValueError(f"{key}={show(value)} must be at most {high}")
        return value

    return check


def stop_strings(key: str, value: Any) -> tuple[str, ...]:
    """Check a stop string or a list of them."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"{key} must be a non-empty string or a list of them, not {show(value)}")
    return tuple(strings)


def token_ids(key: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Check a list of token ids against the vocabulary."""
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError(f"{key} must be a list of token ids, not {show(value)}")
    for position, token in enumerate(value):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{key}[{position}]={show(token)} is outside of the model's vocabulary: ids are 0 to {vocab_size - 1}"
            )
    return tuple(value)


def logit_bias(key: str, value: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Check {"<token id>": bias in [-100, 100]}; sorted by token id."""
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object of token ids and biases, not {show(value)}")
    biases = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 20 and int(token) < vocab_size):
            raise ValueError(f"{key} has the key {show(token)}, not a token id from 0 to {vocab_size - 1}")
        biases[int(token)] = number(-100, 100)(f"{key}[{token}]", bias)
    return tuple(sorted(biases.items()))


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": integer(1),
    "min_tokens": integer(0),
    "temperature": number(0),
    "top_k": integer(-1, 2**31 - 1),  # -1 and 0: all
    "top_p": number(0, 1, above=True),
    "min_p": number(0, 1),
    "repetition_penalty": number(0, above=True),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logprobs": integer(0, 20),
    "n": integer(1, 1024),
    "seed": integer(INT64_MIN),
    "stop": stop_strings,
    "ignore_eos": boolean,
    "skip_special_tokens": boolean,
    "include_stop_str_in_output": boolean,
}
VOCABULARY_CHECKS: dict[str, Callable[[str, Any, int], Any]] = {
    "stop_token_ids": token_ids,
    "logit_bias": logit_bias,
}


def check_sampling(values: Mapping[str, Any], vocab_size: int, prefix: str = "") -> dict[str, Any]:
    """The sampling keys among `values`, checked and converted; null means not given.

    Raises:
        ValueError: names the key (after `prefix`), the value and the limit.
    """
    checked = {}
    for key, value in values.items():
        if value is not None and key in CHECKS:
            checked[key] = CHECKS[key](prefix + key, value)
        elif value is not None and key in VOCABULARY_CHECKS:
            checked[key] = VOCABULARY_CHECKS[key](prefix + key, value, vocab_size)
    return checked


def default_sampling(generation_config: Mapping[str, Any], sampling: SamplingConfig, vocab_size: int) -> dict[str, Any]:
    """What holds for a row that says nothing: `sampling.*`, else generation_config.json, else neutral.

    Raises:
        ValueError: a value of either is out of range, named with where it stands.
    """
    of_model = {key: generation_config.get(key) for key in FROM_GENERATION_CONFIG}
    of_model["max_tokens"] = generation_config.get("max_new_tokens")
    return (
        NEUTRAL
        | check_sampling(of_model, vocab_size, "generation_config.json: ")
        | check_sampling(dataclasses.asdict(sampling), vocab_size, "sampling.")
    )


def eos_tokens(generation_config: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids that end an answer: generation_config.json's (an id or a list) and the tokenizer's, as vLLM."""
    configured = generation_config.get("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    ids = [*ids, getattr(tokenizer, "eos_token_id", None)]
    return tuple(sorted({token for token in ids if token is not None and 0 <= token < vocab_size}))


def sampling_params(values: Mapping[str, Any], available: int, eos: tuple[int, ...]) -> SamplingParams:
    """Sampling parameters of a prompt's choices, from checked `values` that hold every key of NEUTRAL.

    `available` is how many tokens fit behind the prompt. A larger max_tokens is cut to it, as in vLLM's offline API
    (its server refuses): the answer's finish_reason is then "length".

    Raises:
        ValueError: min_tokens is larger than max_tokens.
    """
    most, least = values["max_tokens"], values["min_tokens"]
    if most is not None and least > most:
        raise ValueError(f"min_tokens={least} is larger than max_tokens={most}")
    most = available if most is None else min(most, available)
    temperature = values["temperature"]
    shared = {key: value for key, value in values.items() if key not in ("n", "seed")}
    shared |= {
        "max_tokens": most,
        "min_tokens": min(least, most),
        "temperature": max(temperature, MIN_TEMPERATURE) if temperature else 0.0,
        "top_k": max(values["top_k"], 0),
        "eos_token_ids": eos,
    }
    return SamplingParams(**shared)


def random_stream(seed: int, custom_id: str, choice: int) -> int:
    """Key of a choice's random stream in [0, 2**64): the same on any topology and in any batch."""
    return digest64(f"{seed}/{choice}/{custom_id}".encode())
