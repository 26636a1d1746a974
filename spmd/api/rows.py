"""One line of the input: an OpenAI batch request or a short row, parsed into a `Job`, or a `BadRow` that says why not.

A batch request has `custom_id`, `method`, `url` and `body`; a short row is the body itself (`prompt` or `messages`
and any sampling keys), with or without a `custom_id`. Whatever a line holds, only its own row fails. A key nobody
knows is an error too (vLLM ignores it): a mistyped `temprature` would otherwise be noticed after the run, if ever.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spmd.api.prompts import prompt_tokens
from spmd.api.sampling_keys import (
    INT64_MIN,
    NEUTRAL,
    boolean,
    check_sampling,
    default_sampling,
    eos_tokens,
    integer,
    sampling_params,
)
from spmd.config import SamplingConfig
from spmd.messages import show
from spmd.schedule.request import Request

MAX_LINE_BYTES = 16 * 2**20  # a prompt of a million token ids takes about half of this
CHAT_URL, COMPLETION_URL = "/v1/chat/completions", "/v1/completions"
BATCH_KEYS = frozenset({"custom_id", "method", "url", "body", "metadata"})
COMMON_KEYS = frozenset({*NEUTRAL, "max_completion_tokens", "priority", "return_token_ids", "add_special_tokens"})
COMPLETION_KEYS = COMMON_KEYS | {"prompt"}
CHAT_KEYS = COMMON_KEYS | {
    "messages",
    "top_logprobs",
    "chat_template_kwargs",
    "continue_final_message",
    "add_generation_prompt",
}
IGNORED_KEYS = frozenset({"model", "user", "metadata", "store", "service_tier", "safety_identifier", "stream_options"})
# What this engine cannot do, with the value that doesn't ask for it.
UNSUPPORTED: dict[str, Any] = {
    "stream": False,
    "echo": False,
    "best_of": 1,
    "use_beam_search": False,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "length_penalty": 1.0,
    "spaces_between_special_tokens": True,
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line that is a JSON object, with its id."""

    index: int  # rows of the input, blank lines not counted, from 0
    custom_id: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be answered."""

    index: int
    custom_id: str
    message: str
    code: str = "invalid_request"  # or invalid_json, duplicate_custom_id, context_length_exceeded
    key: int | None = None  # as a Job's


@dataclass(frozen=True, slots=True)
class Job:
    """A row to answer: one request for each of its n choices, which differ only in `choice` and random stream."""

    index: int
    custom_id: str
    chat: bool  # a chat completion, else a text completion
    requests: list[Request]
    prompt_token_ids: list[int]
    return_token_ids: bool = False
    key: int | None = None  # digest of the row's content, see `spmd.api.reader`


class RowParser:
    """Turns lines into jobs, with everything that doesn't change from row to row.

    Args:
        tokenizer: a transformers tokenizer; None: prompts must be token ids.
        generation_config: content of the model's generation_config.json, {} if it has none.
        sampling: `sampling.*` of the configuration.
        max_model_len: tokens of a request, prompt and output.
        capacity: tokens of one request that the KV cache can hold.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: a default in generation_config or sampling is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Mapping[str, Any],
        sampling: SamplingConfig,
        max_model_len: int,
        capacity: int,
        vocab_size: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.defaults = default_sampling(generation_config, sampling, vocab_size)
        self.eos_token_ids = eos_tokens(generation_config, tokenizer, vocab_size)
        self.max_model_len = max_model_len
        self.capacity = capacity
        self.vocab_size = vocab_size

    def parse(self, line: bytes, index: int) -> Job | BadRow:
        """The job of a line, or what is wrong with it. Raises nothing, whatever the bytes."""
        row = load(line, index)
        return row if isinstance(row, BadRow) else self.build(row)

    def build(self, row: Row) -> Job | BadRow:
        """The job of a loaded row: checked, tokenized, its defaults filled in."""
        try:
            chat, body = _request(row.data)
            values = self.defaults | self._sampling(body, chat)
            if values["stop"] and self.tokenizer is None:
                raise ValueError(f"stop={show(values['stop'])} needs a tokenizer, and the model has none")
            priority = integer(INT64_MIN)("priority", body.get("priority", 0))
            return_token_ids = boolean("return_token_ids", body.get("return_token_ids", False))
            prompt = prompt_tokens(body, chat, self.tokenizer, self.vocab_size)
            room = min(self.max_model_len, self.capacity) - len(prompt)
            if room < 1:
                return BadRow(row.index, row.custom_id, self._too_long(len(prompt)), "context_length_exceeded")
            params = sampling_params(values, room, row.custom_id, self.eos_token_ids)
        except ValueError as error:
            return BadRow(row.index, row.custom_id, str(error))
        requests = [Request(row.index, choice, prompt.copy(), p, priority) for choice, p in enumerate(params)]
        return Job(row.index, row.custom_id, chat, requests, prompt, return_token_ids)

    def _sampling(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        values = dict(body)
        if "max_completion_tokens" in body:
            values["max_tokens"] = integer(1)("max_completion_tokens", body["max_completion_tokens"])
        if not chat:
            return check_sampling(values, self.vocab_size)
        # A chat row says whether it wants logprobs, and how many beside the sampled token's in top_logprobs.
        wanted = values.pop("logprobs", None)
        top = integer(0, 20)("top_logprobs", body.get("top_logprobs", 0))
        if top and not wanted:
            raise ValueError(f"top_logprobs={top} needs logprobs=true")
        checked = check_sampling(values, self.vocab_size)
        if wanted is not None:
            checked["logprobs"] = top if boolean("logprobs", wanted) else None
        return checked

    def _too_long(self, length: int) -> str:
        if self.max_model_len <= self.capacity:
            limit = f"max_model_len is {self.max_model_len}"
        else:
            limit = f"the KV cache holds {self.capacity} tokens of a request (raise scheduler.num_blocks)"
        return f"the prompt has {length} tokens, {limit}, and at least one token of output must fit"


def load(line: bytes, index: int) -> Row | BadRow:
    """The JSON object of a line and its id, `row-<index>` if it has none: all that rows of other replicas need."""
    own_id = f"row-{index}"
    if len(line) > MAX_LINE_BYTES:
        return BadRow(index, own_id, f"the line has more than {MAX_LINE_BYTES} bytes", "invalid_json")
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow(index, own_id, f"the line is not valid JSON: {error}", "invalid_json")
    if not isinstance(data, dict):
        return BadRow(index, own_id, f"the line is not a JSON object but {show(data)}", "invalid_json")
    custom_id = data.get("custom_id")
    if custom_id is None:
        custom_id = own_id
    surrogates = b"\\ud" in line or b"\\uD" in line
    if not isinstance(custom_id, str) or not custom_id or (surrogates and not _is_unicode(custom_id)):
        return BadRow(index, own_id, f"custom_id must be a non-empty string, not {show(custom_id)}")
    if surrogates and not _is_unicode(data):
        return BadRow(index, custom_id, "the line has half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    return Row(index, custom_id, data)


def _is_unicode(data: Any) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _request(data: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether a row is chat, and its body without nulls."""
    if data.keys() & {"body", "url", "method"}:
        chat, body = _batch_request(data)
    else:
        body = {key: value for key, value in data.items() if key != "custom_id"}
        chat = body.get("messages") is not None
    body = {key: value for key, value in body.items() if value is not None}
    if "prompt" in body and "messages" in body:
        raise ValueError("the row has both prompt and messages")
    if (needed := "messages" if chat else "prompt") not in body:
        raise ValueError(f"the row has no {needed}" if "url" in data else "the row has neither prompt nor messages")
    _check_keys(body, CHAT_KEYS if chat else COMPLETION_KEYS)
    return chat, body


def _batch_request(data: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    if misplaced := sorted(data.keys() & (CHAT_KEYS | COMPLETION_KEYS)):
        raise ValueError(f"{misplaced[0]} stands beside body, not in it")
    _check_keys(data, BATCH_KEYS)
    if (method := data.get("method", "POST")) != "POST":
        raise ValueError(f"method={show(method)} must be 'POST'")
    if (url := data.get("url")) not in (CHAT_URL, COMPLETION_URL):
        raise ValueError(f"url={show(url)} must be {CHAT_URL} or {COMPLETION_URL}")
    if not isinstance(body := data.get("body"), dict):
        raise ValueError(f"body must be an object, not {show(body)}")
    return url == CHAT_URL, body


def _check_keys(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for key, value in body.items():
        if key in UNSUPPORTED and value != UNSUPPORTED[key]:
            raise ValueError(f"{key}={show(value)} is not supported, only {json.dumps(UNSUPPORTED[key])}")
        if key not in known and key not in IGNORED_KEYS and key not in UNSUPPORTED:
            near = difflib.get_close_matches(key[:50], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "columns of your own may stand under 'metadata'"
            raise ValueError(f"unknown key {show(key)}: {hint}")
