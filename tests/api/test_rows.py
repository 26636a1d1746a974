import json
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from spmd.api.endpoints import CHAT, COMPLETIONS
from spmd.api.rows import (
    BATCH_KEYS,
    BODY_KEYS,
    IGNORED_KEYS,
    UNSUPPORTED,
    BadRow,
    Job,
    Row,
    RowParser,
    load,
)
from spmd.api.sampling_keys import random_stream
from spmd.config import SamplingConfig
from spmd.formats.kind import MAX_LINE_BYTES
from spmd.schedule.request import SamplingParams
from tests.support.broken_rows import MAX_MODEL_LEN, batch, broken_ways, good_row, make_rows
from tests.support.tiny_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()


def make_parser(
    tokenizer: Any = TOKENIZER, sampling: Mapping[str, Any] | None = None, capacity: int = 1000
) -> RowParser:
    return RowParser(tokenizer, {}, SamplingConfig(**(sampling or {})), MAX_MODEL_LEN, capacity, len(TOKENIZER))


def parse(row: Mapping[str, Any], **options: Any) -> Job | BadRow:
    return make_parser(**options).parse(json.dumps(row).encode(), 7)


def job_of(row: Mapping[str, Any], **options: Any) -> Job:
    job = parse(row, **options)
    assert isinstance(job, Job), job
    return job


def params_of(row: Mapping[str, Any], **options: Any) -> SamplingParams:
    return job_of(row, **options).requests[0].params


def bad_row_of(row: Mapping[str, Any], **options: Any) -> BadRow:
    bad = parse(row, **options)
    assert isinstance(bad, BadRow), bad
    return bad


def message_of(row: Mapping[str, Any], **options: Any) -> str:
    return bad_row_of(row, **options).message


def test_batch_completion() -> None:
    body = {"model": "m", "prompt": "hello world", "max_tokens": 5, "return_token_ids": True, "priority": -2}
    job = make_parser().parse(batch("a", "/v1/completions", body), 3)
    assert isinstance(job, Job)
    assert (job.index, job.custom_id, job.endpoint, job.return_token_ids) == (3, "a", COMPLETIONS, True)
    assert job.prompts[0].tokens.tolist() == TOKENIZER.encode("hello world") == [0, 264, 267, 268]
    [request] = job.requests
    assert (request.index, request.choice, request.prompt, request.priority) == (3, 0, job.prompts[0], -2)
    assert request.params.max_tokens == 5
    assert request.params.eos_token_ids == (TOKENIZER.eos_token_id,)


def test_batch_chat_goes_through_the_template() -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    job = make_parser().parse(batch("a", "/v1/chat/completions", {"messages": messages}), 0)
    assert isinstance(job, Job) and job.endpoint is CHAT
    expected = "<|system|>be<eos><|user|>hello<eos><|assistant|>"
    assert job.prompts[0].tokens.tolist() == TOKENIZER.encode(expected, add_special_tokens=False)


def test_chat_options_reach_the_template() -> None:
    def text(messages: list[dict[str, str]], **more: Any) -> str:
        decoded: str = TOKENIZER.decode(job_of({"messages": messages, **more}).prompts[0].tokens.tolist())
        return decoded

    user, begun = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "he"}
    assert text([user], add_generation_prompt=False) == "<|user|>hello<eos>"
    assert text([user, begun], continue_final_message=True) == "<|user|>hello<eos><|assistant|>he"
    assert text([user], chat_template_kwargs={"shout": "ow"}) == "<|user|>hello<eos>ow<|assistant|>"
    assert text([user], add_special_tokens=True).startswith("<bos><|user|>")


def test_short_rows_get_an_id_unless_they_have_one() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "hello"},
        {"prompt": [5, 6]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    for row in rows:
        assert parse(row).custom_id == "row-7"
        assert parse(row | {"custom_id": "mine"}).custom_id == "mine"
    job = job_of({"prompt": [5, 6], "temperature": 0.5, "metadata": {"of": "mine"}})
    assert job.prompts[0].tokens.tolist() == [5, 6] and job.requests[0].params.temperature == 0.5


def test_byte_order_mark_line_end_and_nulls_are_harmless() -> None:
    job = make_parser().parse(b'\xef\xbb\xbf {"prompt": "hello", "stop": null, "stream": null, "echo": false} \r\n', 0)
    assert isinstance(job, Job) and job.requests[0].params.stop == ()


def test_n_choices_share_all_but_their_stream() -> None:
    job = job_of({"prompt": "hello", "n": 3})
    assert [request.choice for request in job.requests] == [0, 1, 2]
    assert [request.stream for request in job.requests] == [
        random_stream(0, job.custom_id, choice) for choice in range(3)
    ]
    job.requests[0].output.append(5)
    assert [*job.requests[1].tokens()] == job.prompts[0].tokens.tolist() == TOKENIZER.encode("hello")
    assert all(request.prompt is job.prompts[0] for request in job.requests)


def test_logprobs_of_both_kinds() -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert params_of({"prompt": "a", "logprobs": 0}).logprobs == 0
    assert params_of({"prompt": "a", "logprobs": 20}).logprobs == 20
    assert params_of({"prompt": "a"}).logprobs is None
    assert params_of(chat | {"logprobs": True, "top_logprobs": 3}).logprobs == 3
    assert params_of(chat | {"logprobs": True}).logprobs == 0
    assert params_of(chat, sampling={"logprobs": 2}).logprobs == 2
    assert params_of(chat | {"logprobs": False}, sampling={"logprobs": 2}).logprobs is None


def test_max_tokens_is_cut_to_what_fits_behind_the_prompt() -> None:
    prompt = [5] * 60
    assert params_of({"prompt": prompt}).max_tokens == 4
    params = params_of({"prompt": prompt, "max_tokens": 50, "min_tokens": 50})
    assert (params.max_tokens, params.min_tokens) == (4, 4)
    assert params_of({"prompt": prompt, "max_tokens": 50}, capacity=62).max_tokens == 2
    assert params_of({"prompt": "a", "max_tokens": 9, "max_completion_tokens": 3}).max_tokens == 3


def test_a_prompt_that_leaves_no_token_for_the_output() -> None:
    assert isinstance(parse({"prompt": [5] * 63}), Job)
    bad = bad_row_of({"prompt": [5] * 64})
    assert bad.code == "context_length_exceeded" and "64 tokens, max_model_len is 64" in bad.message
    bad = bad_row_of({"prompt": [5] * 40}, capacity=32)
    assert bad.code == "context_length_exceeded" and "KV cache holds 32" in bad.message and "40 tokens" in bad.message


def test_without_a_tokenizer_only_token_ids_go() -> None:
    assert job_of({"prompt": [5, 6]}, tokenizer=None).prompts[0].tokens.tolist() == [5, 6]
    assert "no tokenizer" in message_of({"prompt": "hello"}, tokenizer=None)
    assert "none" in message_of({"messages": [{"role": "user", "content": "hi"}]}, tokenizer=None)
    assert "tokenizer" in message_of({"prompt": [5], "stop": "x"}, tokenizer=None)


def test_a_tokenizer_without_a_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert "chat template" in message_of({"messages": [{"role": "user", "content": "hi"}]}, tokenizer=tokenizer)


def test_ids_that_the_model_does_not_know() -> None:
    parser = RowParser(TOKENIZER, {}, SamplingConfig(), 64, 64, vocab_size=100)
    bad = parser.parse(b'{"prompt": "hello"}', 0)
    assert isinstance(bad, BadRow) and "264" in bad.message and "100" in bad.message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "temperature": -1}, ["temperature", "-1", "at least 0"]),
        ({"prompt": "a", "top_p": 0}, ["top_p", "0", "above 0"]),
        ({"prompt": "a", "top_p": 1.5}, ["top_p", "1.5", "at most 1"]),
        ({"prompt": "a", "n": 0}, ["n=0", "at least 1"]),
        ({"prompt": "a", "max_tokens": 0}, ["max_tokens=0", "at least 1"]),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, ["min_tokens=5", "max_tokens=4"]),
        ({"prompt": [5, 269]}, ["prompt[1]=269", "0 to 268"]),
        ({"prompt": "a", "logprobs": 21}, ["logprobs=21", "at most 20"]),
        ({"prompt": "a", "temprature": 1}, ["temprature", "temperature"]),
        ({"prompt": "a", "stream": True}, ["stream=true"]),
        ({"prompt": "a", "messages": []}, ["both", "prompt", "messages"]),
        ({"url": "/v1/x", "body": {}}, ["/v1/x", "/v1/completions"]),
        ({"url": "/v1/completions", "body": {"prompt": "a"}, "max_tokens": 5}, ["max_tokens", "beside body"]),
        ({"messages": [{"role": "poet", "content": "a"}]}, ["template", "poet"]),
    ],
)
def test_messages_name_the_reason_the_value_and_the_limit(row: dict[str, Any], words: list[str]) -> None:
    message = message_of(row)
    assert all(word in message for word in words), message


def test_a_bad_row_keeps_its_id() -> None:
    assert parse({"custom_id": "mine", "prompt": "a", "temperature": float("nan")}).custom_id == "mine"
    assert parse({"custom_id": "mine", "prompt": "\ud800"}).custom_id == "mine"
    assert parse({"custom_id": "\ud800", "prompt": "a"}).custom_id == "row-7"
    assert parse({"custom_id": 5, "prompt": "a"}).custom_id == "row-7"


def test_an_absurdly_large_line() -> None:
    bad = load(b'{"prompt": "' + b"a" * MAX_LINE_BYTES + b'"}', 1)
    assert isinstance(bad, BadRow) and str(MAX_LINE_BYTES) in bad.message and len(bad.message) < 200


def test_messages_are_short_one_liners_and_each_way_has_its_own() -> None:
    parser = make_parser()
    seen: Counter[str] = Counter()
    for way in broken_ways():
        result = parser.parse(way(0), 5)
        if isinstance(result, Job):  # only the duplicate parses by itself
            assert result.custom_id == "good-0"
            continue
        assert 0 < len(result.message) < 350 and "\n" not in result.message, result
        seen[result.message] += 1
    assert len(seen) >= 60 and max(seen.values()) <= 3


def test_the_thousand_row_input() -> None:
    rows = make_rows(900, 100)
    assert len(rows) == 1000 and all(row.endswith(b"\n") and row.count(b"\n") == 1 for row in rows)
    parser = make_parser()
    results = [parser.parse(row, index) for index, row in enumerate(rows)]
    duplicates = [result for result in results[1:] if result.custom_id == "good-0"]
    assert sum(isinstance(result, BadRow) for result in results) + len(duplicates) == 100
    assert len({result.message for result in results if isinstance(result, BadRow)}) >= 50
    assert isinstance(results[0], Job)


def test_no_bytes_make_it_raise() -> None:
    parser = make_parser()
    chance = random.Random(0)
    seeds = [good_row(n) for n in range(4)] * 20 + [way(0) for way in broken_ways()]
    values = [b"null", b"-1", b"1e999", b"NaN", b"true", b'""', b"[]", b"{}", b'"\\udfff"', b"[[1]]", b'{"a":[{}]}']
    kinds: Counter[type] = Counter()
    for _ in range(6000):
        line = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 2)):
            start = chance.randrange(len(line) + 1)
            end = min(len(line), start + chance.randint(0, 6))
            line[start:end] = chance.choice([chance.randbytes(chance.randint(0, 3)), chance.choice(values), line[:8]])
        result = parser.parse(bytes(line), 0)
        result.custom_id.encode()
        if isinstance(result, BadRow):
            result.message.encode()
        kinds[type(result)] += 1
    assert kinds[Job] > 20 and kinds[BadRow] > 1000


def test_any_value_for_any_key_is_a_job_or_a_bad_row() -> None:
    parser = make_parser()
    values: list[object] = [
        None,
        True,
        False,
        0,
        1,
        -1,
        2.5,
        10**40,
        -(10**40),
        1e300,
        "",
        "a",
        [],
        [1],
        [[]],
        ["a"],
        {},
    ]
    values += [{"1": 1}, {"a": {}}]
    keys = sorted(BATCH_KEYS | BODY_KEYS | IGNORED_KEYS | UNSUPPORTED.keys() | {"", "é"})
    bases: list[dict[str, Any]] = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}]
    for base in bases:
        for key in keys:
            for value in values:
                result = parser.parse(json.dumps(base | {key: value}).encode(), 0)
                assert isinstance(result, Job | BadRow)


def test_load_gives_the_id_without_building() -> None:
    row = load(b'{"custom_id": "a", "temperature": "never looked at"}', 4)
    assert isinstance(row, Row) and (row.index, row.custom_id) == (4, "a")


# -- rows that were made for other servers ----------------------------------------------------------------------------

CHAT_BODY = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("/v1/chat/completions", CHAT),
        ("/chat/completions", CHAT),
        ("/openai/deployments/gpt/chat/completions?api-version=2024-10-21", CHAT),
        ("https://api.example.com/v1/chat/completions/", CHAT),
        (None, CHAT),
        ("/v1/completions", COMPLETIONS),
        ("/completions", COMPLETIONS),
        ("http://localhost:8000/v1/completions", COMPLETIONS),
        (None, COMPLETIONS),
    ],
)
def test_urls_of_all_servers_or_none(url: str | None, endpoint: Any) -> None:
    body = CHAT_BODY if endpoint is CHAT else {"prompt": "a"}
    assert job_of({"custom_id": "a", "method": "POST", "url": url, "body": body}).endpoint is endpoint
    if url is None:
        assert job_of({"custom_id": "a", "body": body}).endpoint is endpoint
        assert job_of({"body": body | {"prompt": None, "temperature": 0} | body}).endpoint is endpoint


@pytest.mark.parametrize(
    "url", ["", "/", 5, [], "/v1/embeddings", "/v1/xcompletions", "/v1/completions/x", "completions"]
)
def test_urls_of_something_else(url: Any) -> None:
    assert "must be /v1/chat/completions or /v1/completions" in message_of({"url": url, "body": {"prompt": "a"}})


def test_a_body_that_its_url_or_nothing_tells() -> None:
    assert message_of({"url": "/chat/completions", "body": {"prompt": "a"}}) == "the row has no messages, only 'prompt'"
    assert message_of({"body": {"temperature": 0}}) == "the row has neither prompt nor messages, only 'temperature'"
    assert message_of({"body": CHAT_BODY | {"prompt": "a"}}) == "the row has both prompt and messages"


@pytest.mark.parametrize(
    "keys",
    [
        {"parallel_tool_calls": True},
        {"tool_choice": "auto"},
        {"tool_choice": "none", "tools": []},
        {"modalities": ["text"]},
        {"prompt_cache_key": "x", "prompt_cache_retention": "24h", "safety_identifier": "y"},
        {"verbosity": "low"},
        {"prediction": {"type": "content", "content": "x"}},
        {"extra_body": {}},
        {"extra_body": None, "functions": [], "function_call": "auto"},
        {"cache_salt": "x", "request_id": "y", "include_reasoning": True, "bad_words": []},
    ],
)
def test_keys_that_change_nothing_are_ignored(keys: dict[str, Any]) -> None:
    assert job_of(CHAT_BODY | keys).requests[0].params == params_of(CHAT_BODY)


def test_what_stands_in_extra_body_stands_in_the_body() -> None:
    params = params_of({"prompt": "a", "temperature": 0, "extra_body": {"top_k": 3, "temperature": 1, "min_p": None}})
    assert (params.top_k, params.temperature, params.min_p) == (3, 1.0, 0.0)
    assert "temprature" in message_of({"prompt": "a", "extra_body": {"temprature": 1}})
    assert "extra_body must be an object" in message_of({"prompt": "a", "extra_body": [1]})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tools": [{"type": "function"}]}, ["tools=", "not supported, only []", "chat_template_kwargs"]),
        ({"tool_choice": "required"}, ["tool_choice='required' is not supported", '"none" or "auto"']),
        ({"modalities": ["text", "audio"]}, ["modalities", 'only ["text"]']),
        ({"structured_outputs": {"json": {}}}, ["structured_outputs", "is not supported"]),
        ({"guided_json": {}}, ["guided_json", "is not supported"]),
        ({"response_format": {"type": "json_object"}}, ["response_format", "not supported"]),
        ({"prompt_logprobs": 1}, ["prompt_logprobs=1 is not supported"]),
        ({"top_logprob": 1}, ["unknown key 'top_logprob'", "top_logprobs"]),
    ],
)
def test_keys_that_matter_are_named_without_a_hint_that_misleads(keys: dict[str, Any], words: list[str]) -> None:
    message = message_of(CHAT_BODY | keys)
    assert all(word in message for word in words) and "metadata" not in message, message


def test_a_row_without_a_prompt_is_told_which_keys_it_has() -> None:
    def told(row: Mapping[str, Any]) -> str:
        bad = parse(row)
        assert isinstance(bad, BadRow)
        return bad.message

    assert told({"text": "hello", "id": 5}) == "the row has neither prompt nor messages, only 'text', 'id'"
    assert told({"Prompt": "hello"}) == "the row has neither prompt nor messages, only 'Prompt'"
    assert told({"custom_id": "a"}) == "the row has neither prompt nor messages, no keys at all"
    assert told({"prompt": None, "seed": 1}) == "the row has neither prompt nor messages, only 'seed'"
    asked = json.loads(batch("a", "/v1/completions", {"input": "x"}))
    assert told(asked) == "the row has no prompt, only 'input'"
    assert told(dict.fromkeys(map(str, range(20)), 1)).endswith("'6', '7' and 12 more")


def test_a_text_that_brings_its_own_beginning_is_told() -> None:
    """The row's answer stays what it is."""
    parser = make_parser()
    rows = [
        *({"prompt": "hello"}, {"prompt": "<bos>hello"}, {"prompt": "<bos>hello", "add_special_tokens": False}),
        *({"prompt": [0, 0, 7]}, {"messages": [{"role": "user", "content": "<bos><bos>"}]}, {"prompt": "<bos>x"}),
    ]
    jobs = [parser.parse(json.dumps(row).encode(), place) for place, row in enumerate(rows)]
    assert isinstance(jobs[1], Job) and jobs[1].prompts[0].tokens[:2].tolist() == [0, 0]
    assert parser.begun_twice == 2
    parser.parse(b'{"prompt": ["<bos>a", "b", "<bos>c"]}', 6)
    assert parser.begun_twice == 4
