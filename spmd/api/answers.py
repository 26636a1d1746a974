"""Answer lines in OpenAI's batch format, as vLLM fills it in.

Nothing in them depends on the run: ids are digests of the custom_id and `created` is 0, so that the outputs of two runs
can be compared byte by byte.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from spmd.api.rows import BadRow, Job
from spmd.api.tokenizer import output_text
from spmd.schedule.request import Request, TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no -inf


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice."""

    text: str
    token_ids: Sequence[int]  # with the token that ended it
    finish_reason: str  # stop, length
    stop_reason: int | str | None = None  # stop token id or stop string; None: end-of-sequence token or length
    logprobs: Sequence[TokenLogprobs] | None = None  # of each of token_ids


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
    digest = _digest(job.custom_id)
    build = _chat_choice if job.chat else _completion_choice
    choices = [build(index, completion, tokenizer) for index, completion in enumerate(completions)]
    prompt_tokens, output_tokens = len(job.prompt_token_ids), sum(len(c.token_ids) for c in completions)
    body = {
        "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if job.chat else "text_completion",
        "created": 0,
        "model": model,
        "choices": choices,
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
    """The line (without newline) that says why a row has no answer."""
    return _line(row.custom_id, error={"code": row.code, "message": row.message})


def _chat_choice(index: int, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text},
        "logprobs": _chat_logprobs(completion, tokenizer),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _completion_choice(index: int, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    return {
        "index": index,
        "text": completion.text,
        "logprobs": _completion_logprobs(completion, tokenizer),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _add_token_ids(body: dict[str, Any], job: Job, completions: Sequence[Completion]) -> None:
    """The prompt's ids stand in the body, and for completions also in each choice, where vLLM has them."""
    body["prompt_token_ids"] = job.prompt_token_ids
    for choice, completion in zip(body["choices"], completions, strict=True):
        choice["token_ids"] = list(completion.token_ids)
        if not job.chat:
            choice["prompt_token_ids"] = job.prompt_token_ids


def _chat_logprobs(completion: Completion, tokenizer: Any) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = _token_text(tokenizer, token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode())}

    content = [
        entry(token, at.logprob) | {"top_logprobs": [entry(*likely) for likely in at.top]}
        for token, at in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return {"content": content}


def _completion_logprobs(completion: Completion, tokenizer: Any) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None
    tokens = [_token_text(tokenizer, token) for token in completion.token_ids]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    logprobs = [max(at.logprob, LEAST_LOGPROB) for at in completion.logprobs]
    tops = []
    for token, logprob, at in zip(tokens, logprobs, completion.logprobs, strict=True):
        likeliest = {_token_text(tokenizer, likely): max(value, LEAST_LOGPROB) for likely, value in at.top}
        tops.append({token: logprob} | likeliest)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets[:-1]}


def _token_text(tokenizer: Any, token: int) -> str:
    if tokenizer is None:
        return f"token_id:{token}"  # vLLM's name for a token that has no text
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def _digest(custom_id: str) -> str:
    return blake2b(custom_id.encode(), digest_size=16).hexdigest()


def _line(custom_id: str, response: dict[str, Any] | None = None, error: dict[str, Any] | None = None) -> str:
    line = {"id": f"batch_req_{_digest(custom_id)}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False, allow_nan=False)
