"""What the kinds of request differ in, and that another kind needs nothing but its own value."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from spmd.api.answers import Head, answer_line
from spmd.api.choices import Completion
from spmd.api.endpoints import BY_URL, CHAT, COMMON_KEYS, COMPLETIONS, ENDPOINTS, Endpoint
from spmd.api.prompts import text_prompts
from spmd.api.rows import BadRow, Job, RowParser
from spmd.config import SamplingConfig
from tests.support.broken_rows import batch
from tests.support.tiny_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
PARSER = RowParser(TOKENIZER, {}, SamplingConfig(), 64, 1000, 269)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_endpoint_knows_its_prompt_by_key_and_itself_by_url(endpoint: Endpoint) -> None:
    assert endpoint.prompt_key in endpoint.keys and endpoint.keys >= COMMON_KEYS
    assert [other for other in ENDPOINTS if other.url == endpoint.url] == [endpoint]


def test_logprobs_are_a_number_of_completions_and_a_flag_of_chat() -> None:
    assert COMPLETIONS.sampling({"logprobs": 3}, 269) == {"logprobs": 3}
    assert CHAT.sampling({"logprobs": True, "top_logprobs": 3}, 269) == {"logprobs": 3}
    assert CHAT.sampling({"logprobs": False, "max_completion_tokens": 2}, 269) == {"logprobs": None, "max_tokens": 2}
    with pytest.raises(ValueError, match="top_logprobs=3 needs logprobs=true"):
        CHAT.sampling({"top_logprobs": 3}, 269)


def test_a_third_endpoint_is_one_more_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(body: Mapping[str, Any], tokenizer: Any, vocab_size: int, longest: int) -> list[list[int]]:
        return text_prompts({"prompt": body["input"]}, tokenizer, vocab_size, longest)

    third = replace(
        COMPLETIONS,
        url="/v1/thirds",
        prompt_key="input",
        keys=COMMON_KEYS | {"input"},
        object="third",
        id_prefix="third",
        prompt_ids_in_choices=False,
        prompts=prompts,
    )
    unknown = PARSER.parse(batch("a", third.url, {"input": "hello"}), 0)
    assert isinstance(unknown, BadRow) and unknown.message.endswith("must be /v1/chat/completions or /v1/completions")
    monkeypatch.setattr("spmd.api.rows.ENDPOINTS", (*ENDPOINTS, third))
    monkeypatch.setitem(BY_URL, third.url, third)
    job = PARSER.parse(batch("a", third.url, {"input": "hello", "return_token_ids": True}), 0)
    assert isinstance(job, Job) and job.endpoint is third
    line = answer_line(Head.of(job), [Completion("x", [5], "length")], "tiny", TOKENIZER)
    body = json.loads(line)["response"]["body"]
    assert body["object"] == "third" and body["id"].startswith("third-")
    assert body["prompt_token_ids"] == TOKENIZER.encode("hello")
    assert body["choices"][0]["token_ids"] == [5] and "prompt_token_ids" not in body["choices"][0]
