"""Prompts and messages as OpenAI's and vLLM's servers take them."""

import json
from typing import Any

import pytest

from spmd.api.answers import Head, answer_line
from spmd.api.choices import Completion
from spmd.api.prompts import MOST_CHOICES
from spmd.api.rows import BadRow, Job, RowParser
from spmd.config import SamplingConfig
from tests.support.tiny_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
USER = {"role": "user", "content": "hi"}
# How families write a message with tool calls: as JSON (Qwen2.5, Llama 3, Hermes), item by item, as text (DeepSeek).
AS_JSON = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}:{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
AS_ITEMS = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% for c in m.tool_calls or [] %}"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
)
AS_TEXT = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] + '\\n' + c['function']['arguments'] + '|' }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def parser_of(template: str | None = None) -> RowParser:
    tokenizer = make_tokenizer() if template else TOKENIZER
    if template:
        tokenizer.chat_template = template
    return RowParser(tokenizer, {}, SamplingConfig(), 256, 1000, 269)


def parse(row: dict[str, Any], template: str | None = None) -> Job | BadRow:
    return parser_of(template).parse(json.dumps({"custom_id": "a"} | row).encode(), 0)


def job_of(row: dict[str, Any], template: str | None = None) -> Job:
    job = parse(row, template)
    assert isinstance(job, Job), job
    return job


def token_ids(job: Job) -> list[list[int]]:
    """Those of each of its prompts."""
    return [prompt.tokens.tolist() for prompt in job.prompts]


def message_of(row: dict[str, Any], template: str | None = None) -> str:
    bad = parse(row, template)
    assert isinstance(bad, BadRow), bad
    return bad.message


def rendered(template: str, *messages: dict[str, Any], **more: Any) -> str:
    text: str = TOKENIZER.decode(token_ids(job_of({"messages": [*messages], **more}, template))[0])
    return text


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]} | more


# -- tool calls and content -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ['{"x": 1, "y": "é"}', {"x": 1, "y": "é"}])
def test_arguments_of_tool_calls_reach_templates_as_they_write_them(arguments: Any) -> None:
    assert rendered(AS_JSON, calling(arguments, content=None)) == '<assistant>f:{"x": 1, "y": "é"}'
    assert rendered(AS_ITEMS, calling(arguments)) == "<assistant>x=1;y=é;"


def test_a_template_that_concatenates_arguments_gets_their_text() -> None:
    assert rendered(AS_TEXT, calling('{"x":  1}', content=None)) == 'f\n{"x":  1}|'
    direct = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    assert rendered(direct, calling('{"x":  1}')) == '{"x":  1}'


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_arguments_that_are_empty_are_an_empty_object(arguments: Any) -> None:
    assert rendered(AS_JSON, calling(arguments)) == "<assistant>f:{}"


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', "[" * 100_000])
def test_arguments_that_are_no_json_object_are_named(arguments: str) -> None:
    message = message_of({"messages": [USER, calling(arguments)]}, AS_JSON)
    assert message.startswith("messages[1].tool_calls[0].function.arguments=") and len(message) < 300


@pytest.mark.parametrize("calls", [5, "x", [5], [{"function": 5}], [{"function": {"arguments": 5}}], [{}], {}])
def test_tool_calls_of_any_form_raise_nothing(calls: Any) -> None:
    for template in (AS_JSON, AS_TEXT, "{{ messages | length }}"):
        assert isinstance(parse({"messages": [USER | {"tool_calls": calls}]}, template), Job | BadRow)


@pytest.mark.parametrize("message", [{"role": "assistant"}, {"role": "assistant", "content": None}])
def test_content_that_is_null_is_no_text_to_templates_of_strings(message: dict[str, Any]) -> None:
    assert rendered(AS_JSON, USER, message) == "<user>hi<assistant>"
    assert rendered(AS_ITEMS, USER, message) == "<user>hi<assistant>"


@pytest.mark.parametrize("question", ["is none", "is not none", "== None", "!= none"])
def test_content_that_is_null_is_no_text_to_templates_that_ask_for_it(question: str) -> None:
    template = "{% for m in messages %}{{ m['content'] == '' }}{{ 'x' if m['content'] " + question + " }},{% endfor %}"
    assert rendered(template, {"role": "assistant", "content": None}).startswith("False")


def test_keys_of_messages_that_are_null_or_without_calls_are_not_there() -> None:
    """As clients of OpenAI's write back a message that they got."""
    got = {"role": "assistant", "content": "ok", "refusal": None, "audio": None, "function_call": None}
    asks = (
        "{% for m in messages %}{{ m.content }}{% if 'tool_calls' in m %}calls{% endif %}{{ m | length }};{% endfor %}"
    )
    assert rendered(asks, got | {"tool_calls": None}) == "ok2;"
    assert rendered(asks, got | {"tool_calls": []}) == "ok2;"


def test_parts_of_text_under_all_their_names() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        "c",
        {"type": "refusal", "refusal": "d"},
    ]
    assert rendered(AS_JSON, {"role": "user", "content": parts}) == "<user>a\nb\nc\nd"
    for part in ({"type": "text"}, {"type": ["text"], "text": "a"}, {"type": "image_url"}, 5, {"type": "refusal"}):
        assert "only text parts" in message_of({"messages": [{"role": "user", "content": [part]}]})


@pytest.mark.parametrize(
    ("key", "value"), [("enable_thinking", False), ("reasoning_effort", "low"), ("documents", [{"text": "x"}])]
)
def test_variables_of_templates_may_stand_beside_the_messages(key: str, value: Any) -> None:
    template = "{{ " + key + " is defined }} {{ " + key + " }}"
    assert rendered(template, USER, **{key: value}) == f"True {value}"
    assert rendered(template, USER, chat_template_kwargs={key: value}) == f"True {value}"
    assert rendered(template, USER, extra_body={"chat_template_kwargs": {key: value}}) == f"True {value}"
    assert rendered("{{ " + key + " }}.", USER) in (".", "None.")
    assert "rows with messages may hold it" in message_of({"prompt": "a", key: value})
    assert key in message_of({"messages": [USER], key: 5})


# -- lists of prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["hello", [5, 6]])
def test_a_list_of_one_prompt_is_that_prompt(prompt: Any) -> None:
    row = {"n": 2, "temperature": 1, "return_token_ids": True}
    alone, listed = job_of(row | {"prompt": prompt}), job_of(row | {"prompt": [prompt]})
    assert token_ids(listed) == token_ids(alone)
    assert [request.params for request in listed.requests] == [request.params for request in alone.requests]
    done = [Completion("x", [5], "length")] * 2
    assert answer_line(Head.of(listed), done, "tiny", TOKENIZER) == answer_line(Head.of(alone), done, "tiny", TOKENIZER)


def test_choices_stand_prompt_by_prompt() -> None:
    job = job_of({"prompt": ["hello", [5, 6, 7], "a"], "n": 2, "return_token_ids": True, "max_tokens": 4})
    ids = [TOKENIZER.encode("hello"), [5, 6, 7], TOKENIZER.encode("a")]
    assert token_ids(job) == ids
    assert [[*request.tokens()] for request in job.requests] == [ids[0], ids[0], ids[1], ids[1], ids[2], ids[2]]
    assert [request.choice for request in job.requests] == list(range(6))
    assert len({request.stream for request in job.requests}) == 6
    done = [Completion(str(number), [5] * number, "length") for number in range(6)]
    body = json.loads(answer_line(Head.of(job), done, "tiny", TOKENIZER))["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [choice["text"] for choice in body["choices"]] == list("012345")
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [each for each in ids for _ in range(2)]
    prompt_tokens = sum(map(len, ids))
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 15,
        "total_tokens": prompt_tokens + 15,
    }


def test_each_prompt_has_the_room_behind_it() -> None:
    requests = job_of({"prompt": [[5] * 200, [5] * 100]}).requests
    assert [request.params.max_tokens for request in requests] == [56, 156]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [[]]}, "prompt[0] is empty"),
        ({"prompt": ["a", ""]}, "prompt[1] is empty"),
        ({"prompt": ["a", 5]}, "prompt must be a list of token ids"),
        ({"prompt": [[5], [6, 269]]}, "prompt[1][1]=269"),
        ({"prompt": [["a"]]}, "prompt[0] must be a list of token ids"),
        ({"prompt": [{"a": 1}]}, "prompt must be"),
        ({"prompt": 5}, "prompt must be a string, a list of token ids or a list of such"),
        ({"prompt": ["a"] * 2049}, f"2049 prompts, at most {MOST_CHOICES}"),
        ({"prompt": ["a"] * 1025, "n": 2}, f"are 2050, at most {MOST_CHOICES}"),
        ({"prompt": ["a", [5] * 256]}, "the prompt has 256 tokens"),
        ({"prompt": [5], "add_special_tokens": True}, "add_special_tokens=true needs text"),
        ({"prompt": ["a", [5]], "add_special_tokens": True}, "prompt[1] is token ids"),
    ],
)
def test_what_is_wrong_with_one_of_the_prompts(row: dict[str, Any], words: str) -> None:
    assert words in message_of(row)


def test_special_tokens_that_token_ids_do_without() -> None:
    assert token_ids(job_of({"prompt": [5], "add_special_tokens": False})) == [[5]]
    assert token_ids(job_of({"prompt": ["a"], "add_special_tokens": False})) == [TOKENIZER.encode("a")[1:]]
