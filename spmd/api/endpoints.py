"""The kinds of request that a row can be, one value each: chat and text completions.

Everything in which they differ stands here or is named here; what they share is in `rows` (requests) and `answers`.
A new kind is one more `Endpoint` in `ENDPOINTS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spmd.api.choices import Completion, chat_choice, text_choice
from spmd.api.prompts import TEMPLATE_KEYS, chat_prompts, text_prompts
from spmd.api.sampling_keys import NEUTRAL, boolean, check_sampling, integer

COMMON_KEYS = frozenset({*NEUTRAL, "max_completion_tokens", "priority", "return_token_ids", "add_special_tokens"})


@dataclass(frozen=True)
class Endpoint:
    """How a kind of request is read and how its answer looks."""

    url: str  # of a batch request
    prompt_key: str  # what a body must hold; a short row, which has no url, is of the first kind whose key it holds
    keys: frozenset[str]  # all keys that a body may hold besides those that are ignored
    object: str  # the answer body's "object"
    id_prefix: str  # of the answer body's "id"
    prompt_ids_in_choices: bool  # with return_token_ids: whether each choice repeats the prompt's, as vLLM has it
    # (body, tokenizer, vocab_size, tokens there is room for) -> token ids of each prompt, at least one.
    # TooLong: one has many more; ValueError: they can't be had, and why.
    prompts: Callable[[Mapping[str, Any], Any, int, int], list[list[int]]]
    # (body, vocab_size) -> the sampling keys of the body, checked and named as in NEUTRAL; ValueError: key and limit.
    sampling: Callable[[Mapping[str, Any], int], dict[str, Any]]
    # (number of the choice, choice, tokenizer) -> the choice in the answer, for JSON.
    choice: Callable[[int, Completion, Any], dict[str, Any]]


def _text_sampling(body: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    return check_sampling(_with_max_tokens(body), vocab_size)


def _chat_sampling(body: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A chat row says in logprobs whether it wants them, and in top_logprobs how many beside the sampled token's."""
    values = _with_max_tokens(body)
    wanted = values.pop("logprobs", None)
    top = integer(0, 20)("top_logprobs", body.get("top_logprobs", 0))
    if top and not wanted:
        raise ValueError(f"top_logprobs={top} needs logprobs=true")
    checked = check_sampling(values, vocab_size)
    if wanted is not None:
        checked["logprobs"] = top if boolean("logprobs", wanted) else None
    return checked


def _with_max_tokens(body: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which max_completion_tokens, the newer name, stands as max_tokens."""
    values = dict(body)
    if "max_completion_tokens" in body:
        values["max_tokens"] = integer(1)("max_completion_tokens", body["max_completion_tokens"])
    return values


COMPLETIONS = Endpoint(
    url="/v1/completions",
    prompt_key="prompt",
    keys=COMMON_KEYS | {"prompt"},
    object="text_completion",
    id_prefix="cmpl",
    prompt_ids_in_choices=True,
    prompts=text_prompts,
    sampling=_text_sampling,
    choice=text_choice,
)
CHAT = Endpoint(
    url="/v1/chat/completions",
    prompt_key="messages",
    keys=COMMON_KEYS
    | {"messages", "top_logprobs", "chat_template_kwargs", "continue_final_message", "add_generation_prompt"}
    | TEMPLATE_KEYS.keys(),
    object="chat.completion",
    id_prefix="chatcmpl",
    prompt_ids_in_choices=False,
    prompts=chat_prompts,
    sampling=_chat_sampling,
    choice=chat_choice,
)
ENDPOINTS = (COMPLETIONS, CHAT)
BY_URL = {endpoint.url: endpoint for endpoint in ENDPOINTS}
