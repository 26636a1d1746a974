"""Requests, logits and one call of a fresh sampler: shared by the tests of sampler and penalties."""

from typing import Any

import torch

from spmd.sampling.sampler import Sampler
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams

VOCAB = 50


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def request(
    prompt: list[int] | None = None, output: list[int] | None = None, stream: int = 0, **params: Any
) -> Request:
    made = Request(0, 0, Prompt(prompt or [1, 2, 3]), SamplingParams(**params), stream=stream)
    made.output += output or []
    return made


def here(requests: list[Request]) -> list[int]:
    """Positions to sample at when all that was sampled is committed."""
    return [r.num_tokens for r in requests]


def sample(scores: torch.Tensor, requests: list[Request], positions: list[int] | None = None) -> list[int]:
    return Sampler(scores.shape[1], "cpu").sample(scores, requests, positions or here(requests)).fetch()[0]


VARIED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "stream": 1},
    {"top_k": 3, "stream": 2},
    {"top_p": 0.5, "stream": 3},
    {"min_p": 0.2, "stream": 4, "logprobs": 2},
    {"top_k": 20, "top_p": 0.9, "temperature": 0.7, "stream": 5},
    {"repetition_penalty": 1.3, "stream": 6},
    {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"min_tokens": 5, "eos_token_ids": (7,), "stream": 7},
    {"temperature": 0.0, "logit_bias": ((3, 100.0),)},
    {"top_p": 0.99, "stream": 8},
    {"temperature": 1e-9, "stream": 9},
]
