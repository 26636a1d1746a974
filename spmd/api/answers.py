"""Answer lines in OpenAI's batch format, as vLLM fills it in.

Nothing in them depends on the run: ids are digests of the custom_id and `created` is 0, so that the outputs of two runs
can be compared byte by byte.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from spmd.api.choices import Completion
from spmd.api.rows import BadRow, Job
from spmd.api.tokenizer import output_text
from spmd.journal.format import one_line
from spmd.schedule.request import Request, TokenLogprobs


def complete(
    tokenizer: Any,
    request: Request,
    finish_reason: str,
    stop_reason: int | str | None = None,
    stopped_text: str | None = None,
    logprobs: Sequence[TokenLogprobs] | None = None,
) -> Completion:
    """The completion of a finished request, its output decoded.

    A token that ended it (end of sequence, stop token) is not part of the text unless include_stop_str_in_output,
    as in vLLM. `stopped_text` is `StopChecker.text` where a stop string ended it.
    """
    params, output = request.params, request.output
    if isinstance(stop_reason, str):
        assert stopped_text is not None
        return Completion(stopped_text, output, finish_reason, stop_reason, logprobs)
    by_token = finish_reason == "stop" and not params.include_stop_str_in_output
    prompt = request.tokens[: request.prompt_len]
    text = output_text(tokenizer, prompt, output[:-1] if by_token else output, params.skip_special_tokens)
    return Completion(text, output, finish_reason, stop_reason, logprobs)


def answer_line(job: Job, completions: Sequence[Completion], model: str, tokenizer: Any) -> str:
    """The line (without newline) that answers a job. `completions` in the order of `job.requests`.

    `model` is the one that ran, whatever the row named.
    """
    endpoint, digest = job.endpoint, _digest(job.custom_id)
    prompt_tokens, output_tokens = sum(map(len, job.prompts)), sum(len(c.token_ids) for c in completions)
    body = {
        "id": f"{endpoint.id_prefix}-{digest}",
        "object": endpoint.object,
        "created": 0,
        "model": model,
        "choices": [endpoint.choice(index, completion, tokenizer) for index, completion in enumerate(completions)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
        },
    }
    if job.return_token_ids:
        _add_token_ids(body, job, completions)
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    return _line(job.custom_id, response=response)


def error_line(row: BadRow) -> str:
    """The line (without newline) that says why a row has no answer, as those of OpenAI's file of errors.

    Clients look at `response.status_code`, or at `error`; so both are there.
    """
    error = {"message": row.message, "type": "invalid_request_error", "param": None, "code": row.code}
    response = {"status_code": 400, "request_id": f"req_{_digest(row.custom_id)}", "body": {"error": error}}
    return _line(row.custom_id, response, error={"code": row.code, "message": row.message})


def _add_token_ids(body: dict[str, Any], job: Job, completions: Sequence[Completion]) -> None:
    """Each choice gets its own; a prompt's stand in the body if it is alone, and at some endpoints in choices, too."""
    if len(job.prompts) == 1:
        body["prompt_token_ids"] = job.prompts[0]
    n = len(completions) // len(job.prompts)
    for choice, completion in zip(body["choices"], completions, strict=True):
        choice["token_ids"] = list(completion.token_ids)
        if job.endpoint.prompt_ids_in_choices:
            choice["prompt_token_ids"] = job.prompts[choice["index"] // n]


def _digest(custom_id: str) -> str:
    return blake2b(custom_id.encode(), digest_size=16).hexdigest()


def _line(custom_id: str, response: dict[str, Any], error: dict[str, Any] | None = None) -> str:
    line = {"id": f"batch_req_{_digest(custom_id)}", "custom_id": custom_id, "response": response, "error": error}
    return one_line(json.dumps(line, ensure_ascii=False, allow_nan=False).encode()).decode()
