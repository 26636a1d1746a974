"""One finished choice of an answer, and how chat and text completions show it: the formats of vLLM's server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spmd.schedule.request import TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no -inf


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice."""

    text: str
    token_ids: Sequence[int]  # with the token that ended it
    finish_reason: str  # stop, length
    stop_reason: int | str | None = None  # stop token id or stop string; None: end-of-sequence token or length
    logprobs: Sequence[TokenLogprobs] | None = None  # of each of token_ids


def chat_choice(index: int, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    """The choice of a chat completion, for JSON. Without a tokenizer tokens are named by their ids."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text},
        "logprobs": _chat_logprobs(completion, tokenizer),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def text_choice(index: int, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    """The choice of a text completion, for JSON. Without a tokenizer tokens are named by their ids."""
    return {
        "index": index,
        "text": completion.text,
        "logprobs": _text_logprobs(completion, tokenizer),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _chat_logprobs(completion: Completion, tokenizer: Any) -> dict[str, Any] | None:
    """One object a token, which holds those of the likeliest tokens."""
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


def _text_logprobs(completion: Completion, tokenizer: Any) -> dict[str, Any] | None:
    """Four lists with one item a token; an offset is in characters from the beginning of the output."""
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
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text
