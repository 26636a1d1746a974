"""Judging plans whose requests are ahead of what is committed, or have ended by now."""

import json
from typing import Any

import pytest
import torch

from spmd.api.endpoints import COMPLETIONS
from spmd.api.rows import Job
from spmd.leader import Leader
from spmd.parallel.transfer import HostCopy
from spmd.processes.answer_writer import AnswerWriter
from spmd.report.metrics import Metrics
from spmd.sampling.sampler import PackedLogprobs, Sampled, Sampler
from spmd.schedule.plan import Plan
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import NO_TOKEN, Request, SamplingParams
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB = 269
TOKENIZER = make_tokenizer()
PROMPT = Prompt([7, 8, 9])


class Judged:
    """One request of a leader, judged token by token, none of which is committed before the last."""

    def __init__(self, **params: Any) -> None:
        self.lines: list[dict[str, Any]] = []
        writer = AnswerWriter(TOKENIZER, "tested", lambda _, line, *key: self.lines.append(json.loads(line)))
        self.leader = Leader(TOKENIZER, Metrics(), writer)
        self.request = Request(0, 0, PROMPT, SamplingParams(temperature=0.0, **params))
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
        self.request.output += tokens
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


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("params", [{}, {"logprobs": 1}, {"stop": ("x",), "min_tokens": 3}, {"stop_token_ids": (40,)}])
def test_a_row_without_numbers_even_alone_ends_and_says_so(value: str, params: dict[str, Any]) -> None:
    judged = Judged(max_tokens=9, **params)
    assert not judged.token(41)
    plan = Plan(1, sampled=[judged.request], sample_positions=[len(PROMPT) + 1])
    nowhere = Sampler(VOCAB, "cpu").sample(torch.full((1, VOCAB), float(value)), plan.sampled, plan.sample_positions)
    assert judged.leader.judge(plan, nowhere) == ([NO_TOKEN], [False]), "it is computed once more"
    judged.judged = 2
    assert judged.token(42), "a ghost"
    judged.request.alone = True
    assert judged.leader.judge(plan, nowhere) == ([NO_TOKEN], [True])
    judged.judged = 2
    assert judged.token(42), "another"
    judged.request.output.append(41)
    judged.leader.finish(judged.request)
    judged.leader.close()
    (line,) = judged.lines
    assert "no numbers (NaN or infinity) at token 2" in line["error"]["message"]
    assert (line["error"]["code"], line["response"]["status_code"]) == ("server_error", 500)
    assert (judged.leader.metrics.rows_ok, judged.leader.metrics.rows_failed) == (0, 1)
    assert not judged.leader.rows and not judged.leader.choices


def test_what_a_row_gets_alone_is_its_answer_and_ghosts_of_before_are_not() -> None:
    hello, world = (TOKENIZER.encode(text, add_special_tokens=False) for text in ("hello", " world"))
    judged = Judged(max_tokens=99, stop=("wor",), logprobs=1)
    for token in hello:
        judged.token(token)
    plan = Plan(9, sampled=[judged.request], sample_positions=[len(PROMPT) + len(hello)])
    nowhere = Sampler(VOCAB, "cpu").sample(torch.full((1, VOCAB), torch.nan), plan.sampled, plan.sample_positions)
    assert judged.leader.judge(plan, nowhere) == ([NO_TOKEN], [False])
    judged.judged += 1
    for token in hello:
        judged.token(token)
    judged.request.alone = True
    judged.judged = len(hello)
    verdicts = [judged.token(token) for token in world]
    output = [*hello, *world][: len(hello) + verdicts.index(True) + 1]
    choice = judged.answer(output)
    assert (choice["text"], choice["stop_reason"], choice["token_ids"]) == ("hello ", "wor", output)
    assert len(choice["logprobs"]["tokens"]) == len(output)


def test_one_choice_without_numbers_ends_the_row_s_other_choices_and_no_other_row() -> None:
    lines: list[dict[str, Any]] = []
    leader = Leader(
        TOKENIZER, Metrics(), AnswerWriter(TOKENIZER, "tested", lambda _, line, *key: lines.append(json.loads(line)))
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=3)
    first, bad, late, other = (Request(row, choice, PROMPT, greedy) for row, choice in ((0, 0), (0, 1), (0, 2), (1, 0)))
    leader.open(Job(0, "a", COMPLETIONS, [first, bad, late], [PROMPT]))
    leader.open(Job(1, "b", COMPLETIONS, [other], [PROMPT]))

    def judge(tokens: dict[Request, int], position: int) -> list[bool]:
        plan = Plan(position, sampled=list(tokens), sample_positions=[len(PROMPT) + position] * len(tokens))
        logits = torch.zeros(len(tokens), VOCAB)
        for place, token in enumerate(tokens.values()):
            logits[place, token] = 9.0 if token >= 0 else float("nan")
        found, verdicts = leader.judge(plan, Sampler(VOCAB, "cpu").sample(logits, plan.sampled, plan.sample_positions))
        assert found == list(tokens.values())
        return verdicts

    assert judge({first: 40, bad: 40, other: 40}, 0) == [False, False, False]
    bad.alone = True
    assert judge({first: 41, bad: NO_TOKEN, other: 41}, 1) == [False, True, False]
    leader.finish(bad)
    assert not lines
    assert judge({first: 42, late: 40, other: 42}, 2) == [True, True, True]
    other.output += [40, 41, 42]
    for request in (first, late, other):
        leader.finish(request)
    assert [(line["custom_id"], line["error"] is None) for line in lines] == [("a", False), ("b", True)]
    assert "at token 2 of choice 1" in lines[0]["error"]["message"]
    assert (leader.metrics.rows_ok, leader.metrics.rows_failed) == (1, 1)
    assert not leader.rows and not leader.choices


def test_an_answer_that_cannot_be_put_together_fails_its_row_alone() -> None:
    broken, whole = Judged(logprobs=1, max_tokens=1), Judged(max_tokens=1)
    plan = Plan(0, sampled=[broken.request], sample_positions=[len(PROMPT)])
    unwritable = torch.tensor([[float("nan"), 1.0, 40.0, float("nan")]], dtype=torch.float64)
    logprobs = PackedLogprobs(1, [0], [1], HostCopy(unwritable))
    tokens, verdicts = broken.leader.judge(plan, Sampled(torch.tensor([40]), logprobs))
    assert verdicts == [True]
    broken.request.output += tokens
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
    requests = [Request(0, choice, PROMPT, SamplingParams(temperature=0.0, max_tokens=1)) for choice in range(2)]
    leader.open(Job(0, "a", COMPLETIONS, requests, [PROMPT]))
    plan = Plan(0, sampled=requests, sample_positions=[len(PROMPT)] * 2)
    leader.judge(plan, sampled(plan, 40))
    for request in requests:
        assert not lines
        request.output.append(40)
        leader.finish(request)
    assert len(lines) == 1 and "no such id" in lines[0]
