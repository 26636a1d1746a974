import json
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest

from spmd.api.answers import Finished, Head, answer_line, complete, error_line
from spmd.api.choices import Completion, chat_choice, text_choice
from spmd.api.rows import SERVER_ERROR, BadRow, Job, RowParser
from spmd.config import SamplingConfig
from spmd.schedule.request import Request, TokenLogprobs
from tests.support.tiny_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
PARSER = RowParser(TOKENIZER, {}, SamplingConfig(), 64, 1000, 269)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
HELLO, WORLD = 264, 267  # "hello", " wor"


def make_job(**row: Any) -> Job:
    job = PARSER.parse(json.dumps({"custom_id": "a", **row}).encode(), 0)
    assert isinstance(job, Job)
    return job


def answer(job: Job, *completions: Completion, tokenizer: Any = TOKENIZER) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(answer_line(Head.of(job), completions, "tiny", tokenizer))
    return line


def finished(row: dict[str, Any], output: list[int]) -> Request:
    request = make_job(**row).requests[0]
    request.output.extend(output)
    return request


def test_completion_answer() -> None:
    line = answer(make_job(prompt="hello"), Completion(" wor", [WORLD], "length"))
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert line["id"].startswith("batch_req_") and line["custom_id"] == "a" and line["error"] is None
    assert line["response"]["status_code"] == 200 and line["response"]["request_id"]
    body = line["response"]["body"]
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"], body["created"]) == ("text_completion", "tiny", 0)
    assert body["choices"] == [
        {"index": 0, "text": " wor", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    assert "prompt_token_ids" not in body


def test_chat_answer_with_two_choices_and_token_ids() -> None:
    job = make_job(**CHAT, n=2, return_token_ids=True)
    done = [Completion("hello", [HELLO, 1], "stop"), Completion("", [WORLD], "stop", " wor")]
    body = answer(job, *done)["response"]["body"]
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert [choice["message"] for choice in body["choices"]] == [
        {"role": "assistant", "content": "hello"},
        {"role": "assistant", "content": ""},
    ]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["stop_reason"] for choice in body["choices"]] == [None, " wor"]
    assert body["prompt_token_ids"] == job.prompts[0].tokens.tolist()
    assert [choice["token_ids"] for choice in body["choices"]] == [[HELLO, 1], [WORLD]]
    assert body["usage"]["completion_tokens"] == 3


def test_completion_token_ids() -> None:
    job = make_job(prompt=[5, 6], return_token_ids=True)
    body = answer(job, Completion("hello", [HELLO], "length"))["response"]["body"]
    assert body["prompt_token_ids"] == body["choices"][0]["prompt_token_ids"] == [5, 6]
    assert body["choices"][0]["token_ids"] == [HELLO]


def test_chat_logprobs() -> None:
    logprobs = [TokenLogprobs(-0.5, 1, [(HELLO, -0.5), (WORLD, -math.inf)])]
    body = answer(make_job(**CHAT), Completion("hello", [HELLO], "length", None, logprobs))["response"]["body"]
    hello = {"token": "hello", "logprob": -0.5, "bytes": list(b"hello")}
    world = {"token": " wor", "logprob": -9999.0, "bytes": list(b" wor")}
    assert body["choices"][0]["logprobs"] == {"content": [hello | {"top_logprobs": [hello, world]}]}


def test_completion_logprobs() -> None:
    logprobs = [TokenLogprobs(-0.5, 1, [(WORLD, -0.25)]), TokenLogprobs(-1.0, 2, [])]
    done = Completion("hello wor", [HELLO, WORLD], "length", None, logprobs)
    assert answer(make_job(prompt="x"), done)["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["hello", " wor"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"hello": -0.5, " wor": -0.25}, {" wor": -1.0}],
        "text_offset": [0, 5],
    }


@pytest.mark.parametrize("shape", [chat_choice, text_choice])
def test_a_token_is_decoded_once(shape: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many answers name it: texts of likely tokens would take most of an answer's time."""
    tokenizer = make_tokenizer()
    decode = Mock(wraps=tokenizer.decode)
    monkeypatch.setattr(tokenizer, "decode", decode)
    logprobs = [TokenLogprobs(-0.5, 1, [(HELLO, -0.5), (WORLD, -1.0)])] * 100
    done = Completion("hello" * 100, [HELLO] * 100, "length", None, logprobs)
    assert shape(0, done, tokenizer) == shape(0, done, tokenizer)
    assert [call.args[0] for call in decode.call_args_list] == [[HELLO], [WORLD]]


def test_without_a_tokenizer_tokens_are_named_by_id() -> None:
    done = Completion("", [5], "length", None, [TokenLogprobs(-0.5, 1, [])])
    choice = answer(make_job(prompt=[7]), done, tokenizer=None)["response"]["body"]["choices"][0]
    assert choice["text"] == "" and choice["logprobs"]["tokens"] == ["token_id:5"]


def test_error_line() -> None:
    line = json.loads(error_line(BadRow(3, "row-3", "temperature=-1 must be at least 0")))
    message = "temperature=-1 must be at least 0"
    assert line["custom_id"] == "row-3" and line["error"] == {"code": "invalid_request", "message": message}
    assert line["response"]["status_code"] == 400 and line["response"]["request_id"].startswith("req_")
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request"}
    assert line["response"]["body"] == {"error": error}


def test_an_error_that_is_no_fault_of_the_row_has_the_status_of_a_server() -> None:
    line = json.loads(error_line(BadRow(3, "row-3", "no numbers", SERVER_ERROR)))
    assert line["response"]["status_code"] == 500
    error = {"message": "no numbers", "type": "server_error", "param": None, "code": "server_error"}
    assert line["response"]["body"] == {"error": error}
    assert line["error"] == {"code": "server_error", "message": "no numbers"}
    for code in ("invalid_json", "duplicate_custom_id", "context_length_exceeded"):
        assert json.loads(error_line(BadRow(3, "row-3", "why", code)))["response"]["status_code"] == 400


def test_lines_are_one_line_and_the_same_in_every_run() -> None:
    job, done = make_job(prompt="x"), Completion("a\nb\u2028\tü€", [5], "stop", 7)
    line = answer_line(Head.of(job), [done], "tiny", TOKENIZER)
    assert line == answer_line(Head.of(job), [done], "tiny", TOKENIZER)
    assert "\n" not in line and "\t" not in line and "ü€" in line and "\u2028" not in line
    assert json.loads(line)["response"]["body"]["choices"][0]["text"] == done.text
    other = make_job(custom_id="b", prompt="x")
    assert answer(job, done)["id"] != answer(other, done)["id"]


@pytest.mark.parametrize(
    ("row", "output", "reason", "text"),
    [
        ({}, [HELLO, 1], ("stop", None), "hello"),
        ({"skip_special_tokens": False}, [HELLO, 1], ("stop", None), "hello"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, [HELLO, 1], ("stop", None), "hello<eos>"),
        ({"stop_token_ids": [WORLD]}, [HELLO, WORLD], ("stop", WORLD), "hello"),
        ({"stop_token_ids": [WORLD], "include_stop_str_in_output": True}, [HELLO, WORLD], ("stop", WORLD), "hello wor"),
        ({}, [HELLO, WORLD], ("length", None), "hello wor"),
        ({"ignore_eos": True, "skip_special_tokens": False}, [1, HELLO], ("length", None), "<eos>hello"),
    ],
)
def test_complete_leaves_the_ending_token_out_of_the_text(
    row: dict[str, Any], output: list[int], reason: tuple[str, int | None], text: str
) -> None:
    done = complete(TOKENIZER, Finished.of(finished({"prompt": "x"} | row, output), *reason))
    assert (done.text, list(done.token_ids)) == (text, output)
    assert (done.finish_reason, done.stop_reason) == reason


def test_complete_takes_the_text_cut_at_a_stop_string() -> None:
    done = complete(TOKENIZER, Finished.of(finished({"prompt": "x", "stop": "llo"}, [HELLO]), "stop", "llo", "he"))
    assert (done.text, list(done.token_ids), done.stop_reason) == ("he", [HELLO], "llo")
