"""One finished choice of an answer, and how chat and text completions show it: the formats of vLLM's server."""

from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from spmd.api.token_bytes import UNFINISHED, token_bytes
from spmd.schedule.request import TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no -inf
MOST_TEXTS = 2**17  # of tokens, kept: some 20 MB


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
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(_bytes(tokenizer, token, text))}

    content = [
        entry(token, at.logprob) | {"top_logprobs": [entry(*likely) for likely in at.top]}
        for token, at in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return {"content": content}


def _text_logprobs(completion: Completion, tokenizer: Any) -> dict[str, Any] | None:
    """Four lists with one item a token; an offset is in characters from the beginning of the output.

    Where several of the likeliest tokens have the same text, the first of them stands for all, and the sampled token
    for all that are like it.
    """
    if completion.logprobs is None:
        return None
    tokens = [_token_text(tokenizer, token) for token in completion.token_ids]
    logprobs = [max(at.logprob, LEAST_LOGPROB) for at in completion.logprobs]
    tops = []
    for token, logprob, at in zip(tokens, logprobs, completion.logprobs, strict=True):
        top = {token: logprob}
        for likely, value in at.top:
            top.setdefault(_token_text(tokenizer, likely), max(value, LEAST_LOGPROB))
        tops.append(top)
    offsets = list(_offsets(tokenizer, zip(completion.token_ids, tokens, strict=True)))
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _offsets(tokenizer: Any, tokens: Iterable[tuple[int, str]]) -> Iterator[int]:
    """Where in the output each token, given with its text, begins: one within a character, where that begins."""
    at, reader = 0, getincrementaldecoder("utf-8")("replace")
    for token, text in tokens:
        if UNFINISHED in text:
            yield at
            at += len(reader.decode(_bytes(tokenizer, token, text)))
        else:
            at += len(reader.decode(b"", final=True))  # of a character that went no further
            yield at
            at += len(text)


@lru_cache(MOST_TEXTS)  # likely tokens are the same ones again and again; decoding one takes some 25 us
def _token_text(tokenizer: Any, token: int) -> str:
    if tokenizer is None:
        return f"token_id:{token}"  # vLLM's name for a token that has no text
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text


def _bytes(tokenizer: Any, token: int, text: str) -> bytes:
    return text.encode() if tokenizer is None else token_bytes(tokenizer, token, text)
