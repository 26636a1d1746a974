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

from spmd.api.endpoints import COMPLETIONS, ENDPOINTS, Endpoint
from spmd.api.prompts import begins_twice
from spmd.api.sampling_keys import INT64_MIN, boolean, default_sampling, eos_tokens, integer, sampling_params
from spmd.config import SamplingConfig
from spmd.messages import listed, show
from spmd.schedule.request import Request

MAX_LINE_BYTES = 16 * 2**20  # a prompt of a million token ids takes about half of this
MOST_KEYS = 8  # of a row, that a message lists
BATCH_KEYS = frozenset({"custom_id", "method", "url", "body", "metadata"})
BODY_KEYS = frozenset[str]().union(*(endpoint.keys for endpoint in ENDPOINTS))
PROMPT_KEYS = tuple(dict.fromkeys(endpoint.prompt_key for endpoint in ENDPOINTS))
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
    endpoint: Endpoint  # what kind of request it is
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
        self.begun_twice = 0  # rows so far whose text brought a BOS that the tokenizer adds too

    @property
    def caution(self) -> str:
        """What is allowed but rarely meant in the rows so far; empty: nothing."""
        if not self.begun_twice:
            return ""
        return (
            f"{self.begun_twice:,} prompts begin with {self.tokenizer.bos_token!r} and get another one from the "
            f"tokenizer; leave it out of the text, or set add_special_tokens to false in these rows"
        )

    def parse(self, line: bytes, index: int) -> Job | BadRow:
        """The job of a line, or what is wrong with it. Raises nothing, whatever the bytes."""
        row = load(line, index)
        return row if isinstance(row, BadRow) else self.build(row)

    def build(self, row: Row) -> Job | BadRow:
        """The job of a loaded row: checked, tokenized, its defaults filled in."""
        try:
            endpoint, body = _request(row.data)
            values = self.defaults | endpoint.sampling(body, self.vocab_size)
            if values["stop"] and self.tokenizer is None:
                raise ValueError(f"stop={show(values['stop'])} needs a tokenizer, and the model has none")
            priority = integer(INT64_MIN)("priority", body.get("priority", 0))
            return_token_ids = boolean("return_token_ids", body.get("return_token_ids", False))
            prompt = endpoint.prompt(body, self.tokenizer, self.vocab_size)
            self.begun_twice += begins_twice(prompt, body, self.tokenizer)
            available = min(self.max_model_len, self.capacity) - len(prompt)
            if available < 1:
                return BadRow(row.index, row.custom_id, self._too_long(len(prompt)), "context_length_exceeded")
            params = sampling_params(values, available, row.custom_id, self.eos_token_ids)
        except ValueError as error:
            return BadRow(row.index, row.custom_id, str(error))
        requests = [Request(row.index, choice, prompt.copy(), p, priority) for choice, p in enumerate(params)]
        return Job(row.index, row.custom_id, endpoint, requests, prompt, return_token_ids)

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


def _request(data: dict[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    """A row's endpoint, and its body without nulls."""
    if data.keys() & {"body", "url", "method"}:
        endpoint, body = _batch_request(data)
    else:
        body = {key: value for key, value in data.items() if key != "custom_id"}
        given = (endpoint for endpoint in ENDPOINTS if body.get(endpoint.prompt_key) is not None)
        endpoint = next(given, COMPLETIONS)
    body = {key: value for key, value in body.items() if value is not None}
    if len(prompts := [key for key in PROMPT_KEYS if key in body]) > 1:
        raise ValueError(f"the row has both {' and '.join(prompts)}")
    if endpoint.prompt_key not in body:
        missing = f"no {endpoint.prompt_key}" if "url" in data else f"neither {' nor '.join(PROMPT_KEYS)}"
        there = f"only {listed([show(key) for key in body], MOST_KEYS)}" if body else "no keys at all"
        raise ValueError(f"the row has {missing}, {there}")
    _check_keys(body, endpoint.keys)
    return endpoint, body


def _batch_request(data: dict[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    if misplaced := sorted(data.keys() & BODY_KEYS):
        raise ValueError(f"{misplaced[0]} stands beside body, not in it")
    _check_keys(data, BATCH_KEYS)
    if (method := data.get("method", "POST")) != "POST":
        raise ValueError(f"method={show(method)} must be 'POST'")
    url, by_url = data.get("url"), {endpoint.url: endpoint for endpoint in ENDPOINTS}
    if not isinstance(url, str) or url not in by_url:
        raise ValueError(f"url={show(url)} must be {' or '.join(sorted(by_url))}")
    if not isinstance(body := data.get("body"), dict):
        raise ValueError(f"body must be an object, not {show(body)}")
    return by_url[url], body


def _check_keys(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for key, value in body.items():
        if key in UNSUPPORTED and value != UNSUPPORTED[key]:
            raise ValueError(f"{key}={show(value)} is not supported, only {json.dumps(UNSUPPORTED[key])}")
        if key not in known and key not in IGNORED_KEYS and key not in UNSUPPORTED:
            near = difflib.get_close_matches(key[:50], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "columns of your own may stand under 'metadata'"
            raise ValueError(f"unknown key {show(key)}: {hint}")
