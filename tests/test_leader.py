"""Judging plans whose requests are ahead of what is committed, or have ended by now."""

import json
from typing import Any

import pytest
import torch

from spmd.api.endpoints import COMPLETIONS
from spmd.api.rows import Job
from spmd.leader import Leader
from spmd.processes.answer_writer import AnswerWriter
from spmd.report.metrics import Metrics
from spmd.sampling.sampler import Sampled, Sampler
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request, SamplingParams
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB = 269
TOKENIZER = make_tokenizer()
PROMPT = [7, 8, 9]


class Judged:
    """One request of a leader, judged token by token, none of which is committed before the last."""

    def __init__(self, **params: Any) -> None:
        self.lines: list[dict[str, Any]] = []
        writer = AnswerWriter(TOKENIZER, "tested", lambda _, line, *key: self.lines.append(json.loads(line)))
        self.leader = Leader(TOKENIZER, Metrics(), writer)
        self.request = Request(0, 0, [*PROMPT], SamplingParams(temperature=0.0, **params))
        self.leader.open(Job(0, "a", COMPLETIONS, [self.request], [PROMPT], return_token_ids=True))
        self.judged = 0

    def token(self, token: int) -> bool:
        """The verdict on the next token."""
        plan = Plan(self.judged, sampled=[self.request], sample_positions=[len(PROMPT) + self.judged])
        self.judged += 1
        tokens, verdicts = self.leader.judge(plan, sampled(plan, token))
        assert tokens == [token]
        return verdicts[0]

    def answer(self, tokens: list[int]) -> dict[str, Any]:
        """The choice of the answer, once the tokens are committed."""
        self.request.tokens += tokens
        self.leader.finish(self.request)
        (line,) = self.lines
        choice: dict[str, Any] = line["response"]["body"]["choices"][0]
        return choice


def sampled(plan: Plan, token: int) -> Sampled:
    logits = torch.zeros(len(plan.sampled), VOCAB)
    logits[:, token] = 9.0
    return Sampler(VOCAB, "cpu").sample(logits, plan.sampled, plan.sample_positions)


def test_length_counts_tokens_that_are_not_committed() -> None:
    judged = Judged(max_tokens=3)
    assert [judged.token(token) for token in (40, 41, 42)] == [False, False, True]
    assert judged.answer([40, 41, 42])["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"eos_token_ids": (42, 43)}, ("stop", None)),
        ({"eos_token_ids": (42,), "stop_token_ids": (42,)}, ("stop", None)),
        ({"eos_token_ids": (42,), "stop_token_ids": (42,), "ignore_eos": True}, ("stop", 42)),
        ({"eos_token_ids": (42,), "ignore_eos": True}, None),
        ({"stop_token_ids": (41, 42)}, ("stop", 42)),
        ({"stop_token_ids": (42,), "max_tokens": 2}, ("stop", 42)),
        ({"max_tokens": 2}, ("length", None)),
    ],
)
def test_why_a_token_ends_the_request(params: dict[str, Any], reason: tuple[str, int | None] | None) -> None:
    judged = Judged(**{"max_tokens": 9} | params)
    assert [judged.token(40), judged.token(42)] == [False, reason is not None]
    if reason:
        choice = judged.answer([40, 42])
        assert (choice["finish_reason"], choice["stop_reason"]) == reason


def test_a_ghost_row_changes_nothing_before_the_answer() -> None:
    judged = Judged(max_tokens=9, stop_token_ids=(42,), logprobs=1)
    assert [judged.token(token) for token in (40, 42, 43, 42)] == [False, True, True, True]
    choice = judged.answer([40, 42])
    assert (choice["finish_reason"], choice["stop_reason"], choice["token_ids"]) == ("stop", 42, [40, 42])
    assert len(choice["logprobs"]["token_logprobs"]) == 2
    assert judged.leader.metrics.output_tokens == 2


def test_a_ghost_row_after_the_answer_is_passed_over() -> None:
    judged = Judged(max_tokens=9, stop_token_ids=(42,))
    assert judged.token(42)
    judged.answer([42])
    assert judged.token(43)
    assert (len(judged.lines), judged.leader.metrics.output_tokens) == (1, 1)
    assert not judged.leader.rows


def test_a_ghost_row_adds_no_text_behind_a_stop_string() -> None:
    hello, world = (TOKENIZER.encode(text, add_special_tokens=False) for text in ("hello", " world"))
    judged = Judged(max_tokens=99, stop=("wor",))
    verdicts = [judged.token(token) for token in [*hello, *world, *hello]]
    output = [*hello, *world][: verdicts.index(True) + 1]
    assert all(verdicts[len(output) - 1 :])
    choice = judged.answer(output)
    assert (choice["text"], choice["stop_reason"], choice["token_ids"]) == ("hello ", "wor", output)


def test_an_answer_that_cannot_be_put_together_fails_its_row_alone() -> None:
    broken, whole = Judged(logprobs=1, max_tokens=1), Judged(max_tokens=1)
    plan = Plan(0, sampled=[broken.request], sample_positions=[len(PROMPT)])
    nowhere = Sampler(VOCAB, "cpu").sample(torch.full((1, VOCAB), float("nan")), plan.sampled, plan.sample_positions)
    tokens, verdicts = broken.leader.judge(plan, nowhere)
    assert verdicts == [True]
    broken.request.tokens += tokens
    broken.leader.finish(broken.request)
    broken.leader.close()
    (line,) = broken.lines
    assert "the answer can't be put together" in str(line["error"]) and "server_error" in str(line["error"])
    assert (broken.leader.metrics.rows_ok, broken.leader.metrics.rows_failed) == (0, 1)
    assert not broken.leader.rows and not broken.leader.choices
    whole.token(40)
    assert whole.answer([40])["finish_reason"] == "length"


def test_a_tokenizer_that_fails_fails_one_choice_and_so_its_row() -> None:
    class Fails:
        def decode(self, *ids: object, **options: object) -> str:
            raise OSError("no such id")

    lines: list[str] = []
    leader = Leader(TOKENIZER, Metrics(), AnswerWriter(Fails(), "tested", lambda _, line, *key: lines.append(line)))
    requests = [Request(0, choice, [*PROMPT], SamplingParams(temperature=0.0, max_tokens=1)) for choice in range(2)]
    leader.open(Job(0, "a", COMPLETIONS, requests, [PROMPT]))
    plan = Plan(0, sampled=requests, sample_positions=[len(PROMPT)] * 2)
    leader.judge(plan, sampled(plan, 40))
    for request in requests:
        assert not lines
        request.tokens.append(40)
        leader.finish(request)
    assert len(lines) == 1 and "no such id" in lines[0]
