"""Answer lines in OpenAI's batch format, as vLLM fills it in.

Nothing in them depends on the run: ids are digests of the custom_id and `created` is 0, so that the outputs of two runs
can be compared byte by byte.
"""

import json
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from spmd.api.choices import Completion
from spmd.api.endpoints import BY_URL
from spmd.api.rows import SERVER_ERROR, BadRow, Job
from spmd.api.tokenizer import MOST_CONTEXT, output_text
from spmd.journal.format import one_line
from spmd.schedule.request import Request, token_logprobs


class Finished(NamedTuple):
    """A choice that has ended, as the loop hands it on: no text yet, and numbers in arrays, which travel at no cost."""

    context: Sequence[int]  # the last tokens of the prompt
    tokens: "array[int]"  # of the output, with the one that ended it
    skip_special_tokens: bool
    shows_stop: bool  # the token that ended it is part of the text
    finish_reason: str
    stop_reason: int | str | None
    stopped_text: str | None  # `StopChecker.text` where a stop string ended it
    logprobs: "array[float] | None"  # as `Sampled.fetch` gives them, token behind token

    @classmethod
    def of(
        cls,
        request: Request,
        finish_reason: str,
        stop_reason: int | str | None = None,
        stopped_text: str | None = None,
        logprobs: "array[float] | None" = None,
    ) -> "Finished":
        params = request.params
        return cls(
            request.prompt.tokens[-MOST_CONTEXT:],
            array("i", request.output),
            params.skip_special_tokens,
            params.include_stop_str_in_output,
            finish_reason,
            stop_reason,
            stopped_text,
            logprobs if params.logprobs is not None else None,
        )


class Head(NamedTuple):
    """What an answer repeats of its row."""

    row: int  # its number
    custom_id: str
    url: str  # of the endpoint
    key: int | None
    prompt_tokens: int
    prompts: list[list[int]] | None  # token ids, where the answer is to have ids
    metadata: str = ""  # JSON, or empty

    @classmethod
    def of(cls, job: Job) -> "Head":
        shown = [prompt.tokens.tolist() for prompt in job.prompts] if job.return_token_ids else None
        prompt_tokens = sum(map(len, job.prompts))
        return cls(job.index, job.custom_id, job.endpoint.url, job.key, prompt_tokens, shown, job.metadata)


def complete(tokenizer: Any, finished: Finished) -> Completion:
    """The completion of a choice, its output decoded.

    A token that ended it (end of sequence, stop token) is not part of the text unless include_stop_str_in_output,
    as in vLLM.
    """
    f, tokens, text = finished, finished.tokens.tolist(), finished.stopped_text
    if not isinstance(f.stop_reason, str):
        by_token = f.finish_reason == "stop" and not f.shows_stop
        text = output_text(tokenizer, f.context, tokens[:-1] if by_token else tokens, f.skip_special_tokens)
    assert text is not None
    logprobs = None if f.logprobs is None else token_logprobs(f.logprobs, len(tokens))
    return Completion(text, tokens, f.finish_reason, f.stop_reason, logprobs)


def answer_line(head: Head, completions: Sequence[Completion], model: str, tokenizer: Any) -> str:
    """The line (without newline) that answers a row. `completions` in the order of its requests.

    `model` is the one that ran, whatever the row named.
    """
    endpoint, digest = BY_URL[head.url], _digest(head.custom_id)
    output_tokens = sum(len(completion.token_ids) for completion in completions)
    body = {
        "id": f"{endpoint.id_prefix}-{digest}",
        "object": endpoint.object,
        "created": 0,
        "model": model,
        "choices": [endpoint.choice(index, completion, tokenizer) for index, completion in enumerate(completions)],
        "usage": {
            "prompt_tokens": head.prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": head.prompt_tokens + output_tokens,
        },
    }
    if head.prompts:
        _add_token_ids(body, head.prompts, endpoint.prompt_ids_in_choices, completions)
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    return _line(head.custom_id, response, metadata=head.metadata)


def error_line(row: BadRow) -> str:
    """The line (without newline) that says why a row has no answer, as those of OpenAI's file of errors.

    Clients look at `response.status_code`, or at `error`; so both are there. As servers do, it tells 400, a mistake of
    the row's, from 500, which is none and may be gone when the row is tried again.
    """
    status, kind = (500, "server_error") if row.code == SERVER_ERROR else (400, "invalid_request_error")
    error = {"message": row.message, "type": kind, "param": None, "code": row.code}
    response = {"status_code": status, "request_id": f"req_{_digest(row.custom_id)}", "body": {"error": error}}
    return _line(row.custom_id, response, {"code": row.code, "message": row.message}, row.metadata)


def _add_token_ids(
    body: dict[str, Any], prompts: Sequence[list[int]], in_choices: bool, completions: Sequence[Completion]
) -> None:
    """Each choice gets its own; a prompt's stand in the body if it is alone, and at some endpoints in choices, too."""
    if len(prompts) == 1:
        body["prompt_token_ids"] = prompts[0]
    n = len(completions) // len(prompts)
    for choice, completion in zip(body["choices"], completions, strict=True):
        choice["token_ids"] = list(completion.token_ids)
        if in_choices:
            choice["prompt_token_ids"] = prompts[choice["index"] // n]


def _digest(custom_id: str) -> str:
    return blake2b(custom_id.encode(), digest_size=16).hexdigest()


def _line(custom_id: str, response: dict[str, Any], error: dict[str, Any] | None = None, metadata: str = "") -> str:
    """`metadata`: JSON already, so that whatever it holds, the line can be written."""
    line = {"id": f"batch_req_{_digest(custom_id)}", "custom_id": custom_id, "response": response, "error": error}
    text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    if metadata:
        text = f'{text[:-1]}, "metadata": {metadata}}}'
    return one_line(text.encode()).decode()
