"""An input with good rows and rows broken in every way there is a message for, to be read with the tiny tokenizer."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

MAX_MODEL_LEN = 64  # what the rows here are made for


def make_rows(n_good: int, n_bad: int) -> list[bytes]:
    """Lines (with newline) of `n_good` answerable rows with `n_bad` broken ones spread evenly among them."""
    ways = broken_ways()
    bad = [ways[n % len(ways)](n) for n in range(n_bad)]
    good = [good_row(n) for n in range(n_good)]
    rows = []
    for place in range(n_good + n_bad):
        due = (place + 1) * n_bad // (n_good + n_bad) > place * n_bad // (n_good + n_bad)
        # The first row is a good one that duplicates may repeat.
        rows.append(bad.pop(0) if bad and due and place else (good or bad).pop(0))
    return [row + b"\n" for row in rows]


def good_row(n: int) -> bytes:
    """A row of one of the four forms."""
    if n == 0 or n % 4 == 0:
        return batch(f"good-{n}", "/v1/completions", {"prompt": f"hello {n}", "max_tokens": 4})
    if n % 4 == 1:
        body = {"messages": [{"role": "user", "content": f"hello {n}"}], "max_completion_tokens": 3, "temperature": 0}
        return batch(f"good-{n}", "/v1/chat/completions", body)
    if n % 4 == 2:
        return json.dumps({"prompt": [5 + n % 200, 7, 9], "max_tokens": 4, "seed": n}).encode()
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()


def batch(custom_id: Any, url: Any, body: Any, **more: Any) -> bytes:
    """A batch request line."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | more).encode()


def broken_ways() -> list[Callable[[int], bytes]]:
    """Functions from a number (for the row's id) to a broken row, each broken in its own way."""
    chat, text = "/v1/chat/completions", "/v1/completions"
    hello = {"prompt": "hello"}
    user = [{"role": "user", "content": "hello"}]
    bodies: list[tuple[str | None, Any]] = [
        (text, None),
        (text, []),
        (text, {}),
        (text, {"prompt": ""}),
        (text, {"prompt": []}),
        (text, {"prompt": 5}),
        (text, {"prompt": ["a", 5]}),
        (text, {"prompt": [1, 100000]}),
        (text, {"prompt": [-1]}),
        (text, {"prompt": [True]}),
        (text, {"prompt": [5] * 64}),
        (text, hello | {"messages": user}),
        (text, {"messages": user, "max_tokens": 3}),
        (chat, {"prompt": "hello"}),
        (chat, {"messages": []}),
        (chat, {"messages": "hello"}),
        (chat, {"messages": ["hello"]}),
        (chat, {"messages": [{"content": "hello"}]}),
        (chat, {"messages": [{"role": "poet", "content": "hello"}]}),
        (chat, {"messages": [{"role": "user", "content": 5}]}),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
        (chat, {"messages": user, "chat_template_kwargs": {"tokenize": True}}),
        (chat, {"messages": user, "chat_template_kwargs": 5}),
        (chat, {"messages": user, "continue_final_message": True, "add_generation_prompt": True}),
        (chat, {"messages": user, "logprobs": True, "top_logprobs": 21}),
        (chat, {"messages": user, "top_logprobs": 2}),
        (chat, {"messages": user, "logprobs": 5}),
        (text, hello | {"top_logprobs": 2}),
        (text, hello | {"logprobs": 21}),
        (text, hello | {"logprobs": True}),
        (text, hello | {"temperature": -1}),
        (text, hello | {"temperature": "hot"}),
        (text, hello | {"temperature": True}),
        (text, hello | {"temperature": float("nan")}),
        (text, hello | {"top_p": 0}),
        (text, hello | {"top_p": 1.5}),
        (text, hello | {"top_k": -2}),
        (text, hello | {"top_k": 1.5}),
        (text, hello | {"min_p": 2}),
        (text, hello | {"repetition_penalty": 0}),
        (text, hello | {"presence_penalty": 3}),
        (text, hello | {"frequency_penalty": -3}),
        (text, hello | {"n": 0}),
        (text, hello | {"n": 100000}),
        (text, hello | {"max_tokens": 0}),
        (text, hello | {"max_tokens": -4}),
        (text, hello | {"max_completion_tokens": 0}),
        (text, hello | {"min_tokens": 5, "max_tokens": 4}),
        (text, hello | {"seed": 2**63}),
        (text, hello | {"stop": 5}),
        (text, hello | {"stop": ["a", ""]}),
        (text, hello | {"stop_token_ids": [269]}),
        (text, hello | {"stop_token_ids": "x"}),
        (text, hello | {"logit_bias": {"x": 1}}),
        (text, hello | {"logit_bias": {"5": 101}}),
        (text, hello | {"logit_bias": [5]}),
        (text, hello | {"ignore_eos": 1}),
        (text, hello | {"priority": "high"}),
        (text, hello | {"return_token_ids": "yes"}),
        (text, hello | {"stream": True}),
        (text, hello | {"temprature": 0}),
        (text, hello | {"colour": "red"}),
        ("/v1/embeddings", {"input": "hello"}),
        ("", hello),
    ]
    lines = [
        b"{",
        b"hello",
        b"[1, 2]",
        b"\xff\xfe{}",
        b"{}",
        b"[" * 5000,
        b'{"prompt": "half a pair: \\ud800"}',
        b'{"prompt": "hello", "temperature": 1e999}',
        b'{"prompt": "hello", "seed": ' + b"9" * 5000 + b"}",
        b'{"custom_id": 7, "prompt": "hello"}',
        b'{"custom_id": "good-0", "prompt": "hello"}',
    ]
    more: list[dict[str, Any]] = [{"method": "GET"}, {"max_tokens": 4}]
    return [
        *(partial(_line, line) for line in lines),
        *(partial(_request, url, body) for url, body in bodies),
        *(partial(_request, text, hello, more=keys) for keys in more),
    ]


def _line(line: bytes, n: int) -> bytes:
    return line


def _request(url: str | None, body: Any, n: int, more: Mapping[str, Any] | None = None) -> bytes:
    return batch(f"bad-{n}", url, body, **(more or {}))
