"""One line of the input: an OpenAI batch request or a short row, parsed into a `Job`, or a `BadRow` that says why not.

A batch request has `custom_id`, `method`, `url` and `body`; a short row is the body itself (`prompt` or `messages`
and any sampling keys), with or without a `custom_id`. Whatever a line holds, only its own row fails. A key nobody
knows is an error too (vLLM ignores it): a mistyped `temprature` would otherwise be noticed after the run, if ever.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from spmd.api.endpoints import COMPLETIONS, ENDPOINTS, Endpoint
from spmd.api.metadata import metadata_of
from spmd.api.prompts import MOST_CHOICES, TooLong, begun_twice
from spmd.api.sampling_keys import (
    INT64_MIN,
    boolean,
    default_sampling,
    eos_tokens,
    integer,
    random_stream,
    sampling_params,
)
from spmd.config import SamplingConfig
from spmd.formats.kind import MAX_LINE_BYTES
from spmd.messages import listed, show
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request

SERVER_ERROR = "server_error"  # the code of what is no fault of the row
MOST_KEYS = 8  # of a row, that a message lists
BATCH_KEYS = frozenset({"custom_id", "method", "url", "body", "metadata"})
BODY_KEYS = frozenset[str]().union(*(endpoint.keys for endpoint in ENDPOINTS))
PROMPT_KEYS = tuple(dict.fromkeys(endpoint.prompt_key for endpoint in ENDPOINTS))
# Of a table's row: by the key that its prompt stands under, which columns stand beside it.
BESIDE_PROMPT = {endpoint.prompt_key: endpoint.keys for endpoint in ENDPOINTS} | {"body": frozenset({"method", "url"})}
# What changes no answer of a model of one's own: whose row it is, how it is served, and tools where there are none.
IGNORED_KEYS = frozenset(
    {
        *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "stream_options", "verbosity"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction", "request_id", "cache_salt"),
        *("parallel_tool_calls",),
    }
)
# What this engine cannot do, with the values that don't ask for it.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "length_penalty": (1.0,),
    "spaces_between_special_tokens": (True,),
    "include_reasoning": (True,),
    "return_tokens_as_token_ids": (False,),
    "chat_template": (),
}
INSTEAD = {"tools": "tools for the template may stand in chat_template_kwargs"}


@dataclass(frozen=True, slots=True)
class Row:
    """A line that is a JSON object, with its id."""

    index: int  # rows of the input, blank lines not counted, from 0
    custom_id: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be answered, by its own fault or, with SERVER_ERROR, by none of its own."""

    index: int
    custom_id: str
    message: str
    code: str = "invalid_request"  # or one of those in docs/batch-files.md
    key: int | None = None  # as a Job's
    metadata: str = ""  # likewise


@dataclass(frozen=True, slots=True)
class Job:
    """A row to answer: one request for each choice, n to a prompt, which differ only in `choice` and random stream."""

    index: int
    custom_id: str
    endpoint: Endpoint  # what kind of request it is
    requests: list[Request]  # prompt by prompt
    prompts: list[Prompt]
    return_token_ids: bool = False
    key: int | None = None  # digest of the row's content, see `spmd.api.reader`
    metadata: str = ""  # the row's own, which its answer repeats: JSON, see `spmd.api.metadata`


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
        self.begun_twice = 0  # prompts so far whose text brought a BOS that the tokenizer adds too

    @property
    def longest(self) -> int:
        """Tokens of the longest request there can be."""
        return min(self.max_model_len, self.capacity)

    def parse(self, line: bytes, index: int) -> Job | BadRow:
        """The job of a line, or what is wrong with it. Raises nothing, whatever the bytes."""
        row = load(line, index)
        return row if isinstance(row, BadRow) else self.build(row)

    def build(self, row: Row) -> Job | BadRow:
        """The job of a loaded row: checked, tokenized, its defaults filled in."""
        metadata = metadata_of(row.data)
        try:
            endpoint, body = _request(row.data)
            values = self.defaults | endpoint.sampling(body, self.vocab_size)
            if values["stop"] and self.tokenizer is None:
                raise ValueError(f"stop={show(values['stop'])} needs a tokenizer, and the model has none")
            priority = integer(INT64_MIN)("priority", body.get("priority", 0))
            return_token_ids = boolean("return_token_ids", body.get("return_token_ids", False))
            token_ids = endpoint.prompts(body, self.tokenizer, self.vocab_size, self.longest - 1)
            self.begun_twice += begun_twice(token_ids, body, self.tokenizer)
            prompts = [*map(Prompt, token_ids)]
            if (choices := len(prompts) * values["n"]) > MOST_CHOICES:
                raise ValueError(f"{len(prompts)} prompts with n={values['n']} are {choices}, at most {MOST_CHOICES}")
            if self.longest <= (length := max(map(len, prompts))):
                raise TooLong(f"the prompt has {length} tokens")
            requests = [*self._requests(row, values, prompts, priority)]
        except TooLong as error:
            message = f"{error}, {self._limit()}"
            return BadRow(row.index, row.custom_id, message, "context_length_exceeded", metadata=metadata)
        except ValueError as error:
            return BadRow(row.index, row.custom_id, str(error), metadata=metadata)
        return Job(row.index, row.custom_id, endpoint, requests, prompts, return_token_ids, metadata=metadata)

    def _requests(self, row: Row, values: Mapping[str, Any], prompts: list[Prompt], priority: int) -> Iterator[Request]:
        """One for each choice, which are counted through the prompts, as in vLLM's server."""
        choices = count()
        for prompt in prompts:
            params = sampling_params(values, self.longest - len(prompt), self.eos_token_ids)
            for choice in islice(choices, values["n"]):
                stream = random_stream(values["seed"], row.custom_id, choice)
                yield Request(row.index, choice, prompt, params, priority, stream)

    def _limit(self) -> str:
        if self.max_model_len <= self.capacity:
            limit = f"max_model_len is {self.max_model_len}"
        else:
            limit = f"the KV cache holds {self.capacity} tokens of a request (raise scheduler.num_blocks)"
        return f"{limit}, and at least one token of output must fit"


def number_name(index: int) -> str:
    """What a row without custom_id is called, where no other row bears that name."""
    return f"row-{index}"


def load(line: bytes, index: int, name: Callable[[int], str] = number_name) -> Row | BadRow:
    """The JSON object of a line and its id: all that rows of other replicas need.

    `name` gives the id of a row that has none of its own.
    """
    if len(line) > MAX_LINE_BYTES:
        return BadRow(index, name(index), f"the line has more than {MAX_LINE_BYTES} bytes", "invalid_json")
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BadRow(index, name(index), f"the line is not valid JSON: {error}", "invalid_json")
    if not isinstance(data, dict):
        return BadRow(index, name(index), f"the line is not a JSON object but {show(data)}", "invalid_json")
    custom_id = data.get("custom_id")
    if custom_id is None:
        custom_id = name(index)
    surrogates = b"\\ud" in line or b"\\uD" in line
    if not isinstance(custom_id, str) or not custom_id or (surrogates and not _is_unicode(custom_id)):
        message = f"custom_id must be a non-empty string, not {show(custom_id)}"
        return BadRow(index, name(index), message, metadata=metadata_of(data))
    if surrogates and not _is_unicode(data):
        message = "the line has half of a surrogate pair (\\ud800 to \\udfff), which is no text"
        return BadRow(index, custom_id, message, metadata=metadata_of(data))
    return Row(index, custom_id, data)


def has_priority(row: Row) -> bool:
    """Whether a row asks for a priority, well or badly."""
    body = row.data.get("body")
    return bool((body if isinstance(body, dict) else row.data).get("priority"))


def _is_unicode(data: Any) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _request(data: dict[str, Any]) -> tuple[Endpoint, dict[str, Any]]:
    """A row's endpoint, and its body without nulls."""
    named = None
    if data.keys() & {"body", "url", "method"}:
        named, body = _batch_request(data)
    else:
        body = {key: value for key, value in data.items() if key != "custom_id"}
    body = _flat({key: value for key, value in body.items() if value is not None})
    endpoint = named or _by_prompt(body)
    if len(prompts := [key for key in PROMPT_KEYS if key in body]) > 1:
        raise ValueError(f"the row has both {' and '.join(prompts)}")
    if endpoint.prompt_key not in body:
        missing = f"no {endpoint.prompt_key}" if named else f"neither {' nor '.join(PROMPT_KEYS)}"
        there = f"only {listed([show(key) for key in body], MOST_KEYS)}" if body else "no keys at all"
        raise ValueError(f"the row has {missing}, {there}")
    _check_keys(body, endpoint.keys)
    return endpoint, body


def _flat(body: dict[str, Any]) -> dict[str, Any]:
    """A body with what stands under extra_body in its place, as OpenAI's client sends it."""
    extra = body.pop("extra_body", {})
    if not isinstance(extra, dict):
        raise ValueError(f"extra_body must be an object, not {show(extra)}")
    return body | {key: value for key, value in extra.items() if value is not None}


def _batch_request(data: dict[str, Any]) -> tuple[Endpoint | None, dict[str, Any]]:
    """The endpoint of its url, None if it has none (Mistral's and Together's batches), and its body."""
    if misplaced := sorted(data.keys() & BODY_KEYS):
        raise ValueError(f"{misplaced[0]} stands beside body, not in it")
    _check_keys(data, BATCH_KEYS)
    if (method := data.get("method", "POST")) != "POST":
        raise ValueError(f"method={show(method)} must be 'POST'")
    named = None if (url := data.get("url")) is None else _by_url(url)
    if not isinstance(body := data.get("body"), dict):
        raise ValueError(f"body must be an object, not {show(body)}")
    return named, body


def _by_prompt(body: Mapping[str, Any]) -> Endpoint:
    return next((endpoint for endpoint in ENDPOINTS if endpoint.prompt_key in body), COMPLETIONS)


def _by_url(url: Any) -> Endpoint:
    """The endpoint of a url, which may be a whole address, or lack /v1, as in Azure's batches."""
    path = url.partition("?")[0].rstrip("/") if isinstance(url, str) else ""
    for endpoint in sorted(ENDPOINTS, key=lambda endpoint: -len(endpoint.url)):
        if path.endswith(endpoint.url.removeprefix("/v1")):
            return endpoint
    raise ValueError(f"url={show(url)} must be {' or '.join(sorted(endpoint.url for endpoint in ENDPOINTS))}")


def _check_keys(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for key, value in body.items():
        if key in known or key in IGNORED_KEYS:
            continue
        if key not in UNSUPPORTED:
            raise ValueError(f"unknown key {show(key)}: {_hint(key, known)}")
        if value not in UNSUPPORTED[key]:
            only = ", only " + " or ".join(map(json.dumps, UNSUPPORTED[key])) if UNSUPPORTED[key] else ""
            instead = f": {INSTEAD[key]}" if key in INSTEAD else ""
            raise ValueError(f"{key}={show(value)} is not supported{only}{instead}")


def _hint(key: str, known: frozenset[str]) -> str:
    if near := difflib.get_close_matches(key[:50], known, n=1):
        return f"did you mean {near[0]!r}?"
    if of := [endpoint.prompt_key for endpoint in ENDPOINTS if key in endpoint.keys]:
        return f"rows with {' or '.join(of)} may hold it"
    return "columns of your own may stand under 'metadata'"
