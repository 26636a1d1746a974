"""The prompt of a row as token ids: given as such, tokenized from text, or rendered by the chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from spmd.api.sampling_keys import boolean, token_ids
from spmd.messages import first_line, show

# Arguments of apply_chat_template that are not the template's own variables: a row has no say in them.
RESERVED = {
    *("conversation", "chat_template", "tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


def text_prompt(body: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> list[int]:
    """Token ids of `prompt`, at least one: as given, or of a text, with special tokens unless the row says otherwise.

    Raises:
        ValueError: names what is wrong with the prompt, or why it could not be tokenized.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return _checked(_encode(prompt, body, tokenizer, special=True), vocab_size)
    if isinstance(prompt, list):
        return _checked(list(token_ids("prompt", prompt, vocab_size)), vocab_size)
    raise ValueError(f"prompt must be a string or a list of token ids, not {show(prompt)}")


def begins_twice(prompt: Sequence[int], body: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether a text brought its own beginning-of-sequence token, and the tokenizer put another before it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and isinstance(body.get("prompt"), str) and list(prompt[:2]) == [bos, bos]


def chat_prompt(body: Mapping[str, Any], tokenizer: Any, vocab_size: int) -> list[int]:
    """Token ids of `messages` as the chat template writes them, at least one.

    As in vLLM's server, `add_special_tokens` is by default false here, for the template writes them.

    Raises:
        ValueError: names what is wrong with the messages, or why they could not be rendered or tokenized.
    """
    return _checked(_encode(_render(body, tokenizer), body, tokenizer, special=False), vocab_size)


def _checked(ids: list[int], vocab_size: int) -> list[int]:
    if not ids:
        raise ValueError("the prompt is empty")
    if max(ids) >= vocab_size:
        raise ValueError(f"the tokenizer gave the id {max(ids)}, outside of the model's vocabulary of {vocab_size}")
    return ids


def _encode(text: str, body: Mapping[str, Any], tokenizer: Any, special: bool) -> list[int]:
    """`special`: whether to add special tokens where the body doesn't say."""
    if not text:
        raise ValueError("the prompt is empty")
    if tokenizer is None:
        raise ValueError("the prompt is text, but the model has no tokenizer: give token ids or set model.tokenizer")
    if (given := body.get("add_special_tokens")) is not None:
        special = boolean("add_special_tokens", given)
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
        return ids
    except Exception as error:  # what a tokenizer raises is its own affair: it fails this row only
        raise ValueError(f"the tokenizer failed: {first_line(error)}") from error


def _render(body: Mapping[str, Any], tokenizer: Any) -> str:
    messages = _messages(body.get("messages"))
    arguments = body.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"chat_template_kwargs must be an object, not {show(arguments)}")
    if reserved := sorted(RESERVED & arguments.keys()):
        raise ValueError(f"chat_template_kwargs may not hold {reserved[0]!r}")
    proceed = boolean("continue_final_message", body.get("continue_final_message") or False)
    generate = boolean("add_generation_prompt", body.get("add_generation_prompt", not proceed))
    if proceed and generate:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("messages need a chat template, and the tokenizer has none: use 'prompt'")
    arguments = {"add_generation_prompt": generate, "continue_final_message": proceed} | arguments
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        return text
    except Exception as error:  # templates raise what they like, Jinja's errors and Python's
        raise ValueError(f"the chat template failed: {first_line(error)}") from error


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a non-empty list, not {show(messages)}")
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{place}] must be an object, not {show(message)}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{place}].role must be a string, not {show(message.get('role'))}")
    return [message | {"content": _content(place, message.get("content"))} for place, message in enumerate(messages)]


def _content(place: int, content: Any) -> str | None:
    """A message's text; parts are joined by newlines, as vLLM does for templates that take strings."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"messages[{place}].content must be a string or a list of parts, not {show(content)}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"messages[{place}].content holds {show(part)}: only text parts are supported")
    return "\n".join(part["text"] for part in content)
