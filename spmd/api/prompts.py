"""The prompts of a row as token ids: given as such, tokenized from text, or rendered by the chat template."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from spmd.api.sampling_keys import boolean, token_ids
from spmd.messages import first_line, show

# Arguments of apply_chat_template that are not the template's own variables: a row has no say in them.
RESERVED = {
    *("conversation", "chat_template", "tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}
# Where the text of a part of a message stands, by the part's type.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MOST_CHOICES = 2048  # of a row
# A text is first judged by a beginning of this many characters, plus some for each token that there is room for.
SHORTEST_BEGINNING, CHARACTERS_OF_A_TOKEN = 2**16, 4
BEGUN_TWICE = (
    "{:,} prompts begin with the tokenizer's beginning-of-sequence token and get another one from it; leave it out of "
    "the text, or set add_special_tokens to false in these rows"
)
ASKS_FOR_NULL = re.compile(r"content(?:['\"]\])?\s*(?:is\s+(?:not\s+)?|[!=]=\s*)none", re.IGNORECASE)


class TooLong(ValueError):
    """A text has many more tokens than there is room for; the message says what is known of its length."""


def text_prompts(body: Mapping[str, Any], tokenizer: Any, vocab_size: int, longest: int) -> list[list[int]]:
    """Token ids of each prompt in `prompt`, at least one: a text, token ids, or a list of such.

    Text gets special tokens unless the row says otherwise; token ids are taken as they are. `longest`: tokens that a
    prompt may have; one a little longer is returned all the same.

    Raises:
        TooLong: a text is much longer.
        ValueError: names what is wrong with a prompt, or why it could not be tokenized.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        if len(prompt) > MOST_CHOICES:
            raise ValueError(f"{len(prompt)} prompts, at most {MOST_CHOICES}")
        named = {f"prompt[{place}]": one for place, one in enumerate(prompt)}
    else:
        named = {"prompt": prompt}
    return [_text_prompt(name, one, body, tokenizer, vocab_size, longest) for name, one in named.items()]


def _text_prompt(
    name: str, prompt: Any, body: Mapping[str, Any], tokenizer: Any, vocab_size: int, longest: int
) -> list[int]:
    if isinstance(prompt, str):
        return _checked(name, _encode(name, prompt, body, tokenizer, longest, special=True), vocab_size)
    if not isinstance(prompt, list):
        raise ValueError(f"prompt must be a string, a list of token ids or a list of such, not {show(prompt)}")
    if boolean("add_special_tokens", body.get("add_special_tokens", False)):
        raise ValueError(f"add_special_tokens=true needs text, and {name} is token ids: write special tokens there")
    return _checked(name, list(token_ids(name, prompt, vocab_size)), vocab_size)


def begun_twice(prompts: Sequence[Sequence[int]], body: Mapping[str, Any], tokenizer: Any) -> int:
    """How many texts brought their own beginning-of-sequence token, and the tokenizer put another before it."""
    bos, given = getattr(tokenizer, "bos_token_id", None), body.get("prompt")
    texts = given if isinstance(given, list) else [given]
    return sum(isinstance(text, str) and prompt[:2] == [bos, bos] for text, prompt in zip(texts, prompts, strict=False))


def chat_prompts(body: Mapping[str, Any], tokenizer: Any, vocab_size: int, longest: int) -> list[list[int]]:
    """The one prompt of a chat row: token ids of `messages` as the chat template writes them, at least one.

    As in vLLM's server, `add_special_tokens` is by default false here, for the template writes them. `longest` is as
    in `text_prompts`.

    Raises:
        TooLong: the text is much longer.
        ValueError: names what is wrong with the messages, or why they could not be rendered or tokenized.
    """
    ids = _encode("prompt", _render(body, tokenizer, longest), body, tokenizer, longest, special=False)
    return [_checked("prompt", ids, vocab_size)]


def _checked(name: str, ids: list[int], vocab_size: int) -> list[int]:
    if not ids:
        raise ValueError(_empty(name))
    if max(ids) >= vocab_size:
        raise ValueError(f"the tokenizer gave the id {max(ids)}, outside of the model's vocabulary of {vocab_size}")
    return ids


def _empty(name: str) -> str:
    return "the prompt is empty" if name == "prompt" else f"{name} is empty"


def _encode(name: str, text: str, body: Mapping[str, Any], tokenizer: Any, longest: int, special: bool) -> list[int]:
    """`special`: whether to add special tokens where the body doesn't say."""
    if not text:
        raise ValueError(_empty(name))
    if tokenizer is None:
        raise ValueError("the prompt is text, but the model has no tokenizer: give token ids or set model.tokenizer")
    if (given := body.get("add_special_tokens")) is not None:
        special = boolean("add_special_tokens", given)
    _check_length(name, text, tokenizer, longest)
    return _tokenize(tokenizer, text, special)


def _tokenize(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
        return ids
    except Exception as error:  # what a tokenizer raises is its own affair: it fails this row only
        raise ValueError(f"the tokenizer failed: {first_line(error)}") from error


def _check_length(name: str, text: str, tokenizer: Any, longest: int) -> None:
    """Tokenize a beginning of a text that is long, and of one that may fit yet more and more of it.

    A number of characters alone tells nothing: a token may stand for any number of them (of spaces, say, or of unknown
    words), and normalizers drop some. The tokens of a beginning do: what comes behind it can change only those next to
    the cut, where a word, a character or a special token may go on. It would have to join half of all tokens of the
    beginning to make a text fit that is refused here.

    Raises:
        TooLong: a beginning has more than twice the tokens that the text may have.
    """
    size = SHORTEST_BEGINNING + CHARACTERS_OF_A_TOKEN * longest
    while size < len(text):
        found = len(_tokenize(tokenizer, text[:size], special=False))
        if found > 2 * longest:
            which = "the prompt" if name == "prompt" else name
            raise TooLong(f"{which} has {len(text)} characters, of which the first {size} are {found} tokens")
        size *= 2


def _render(body: Mapping[str, Any], tokenizer: Any, longest: int) -> str:
    arguments = _template_arguments(body)
    if (template := getattr(tokenizer, "chat_template", None)) is None:
        raise ValueError("messages need a chat template, and the tokenizer has none: use 'prompt'")
    messages = _messages(body.get("messages"))
    if any(message["content"] is None for message in messages) and not _asks_for_null(template):
        messages = [message | {"content": message["content"] or ""} for message in messages]
    objects = [_with_objects(f"messages[{place}]", message) for place, message in enumerate(messages)]
    try:
        text = _apply(tokenizer, objects, arguments)
    except ValueError:
        with suppress(ValueError):  # joining strings, the template wants that of the row
            return _apply(tokenizer, messages, arguments)
        raise
    _check_length("prompt", text, tokenizer, longest)  # before each of its tool calls is looked for in it
    return _apply(tokenizer, messages, arguments) if _holds_dicts(text, objects) else text


def _apply(tokenizer: Any, messages: list[dict[str, Any]], arguments: Mapping[str, Any]) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        return text
    except Exception as error:  # templates raise what they like, Jinja's errors and Python's
        raise ValueError(f"the chat template failed: {first_line(error)}") from error


def _template_arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    """Of apply_chat_template."""
    arguments = body.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"chat_template_kwargs must be an object, not {show(arguments)}")
    if reserved := sorted(RESERVED & arguments.keys()):
        raise ValueError(f"chat_template_kwargs may not hold {reserved[0]!r}")
    proceed = boolean("continue_final_message", body.get("continue_final_message") or False)
    generate = boolean("add_generation_prompt", body.get("add_generation_prompt", not proceed))
    if proceed and generate:
        raise ValueError("continue_final_message and add_generation_prompt exclude each other")
    variables = {key: check(key, body[key]) for key, check in TEMPLATE_KEYS.items() if key in body}
    return {"add_generation_prompt": generate, "continue_final_message": proceed} | variables | arguments


def _asks_for_null(template: str | Mapping[str, str]) -> bool:
    """Whether a template tells messages apart by content that is null (DeepSeek's does); all others want a string."""
    return any(map(ASKS_FOR_NULL.search, [template] if isinstance(template, str) else template.values()))


def _messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as a template takes them, but for content that is null or missing, which is null.

    As in vLLM: other keys that are null, and tool_calls that are empty, count as not given, for templates ask whether
    they are there.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a non-empty list, not {show(messages)}")
    return [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object, not {show(message)}")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{name}.role must be a string, not {show(message.get('role'))}")
    given = {key: value for key, value in message.items() if value is not None}
    given["content"] = _content(name, message.get("content"))
    if given.get("tool_calls") == []:
        del given["tool_calls"]
    return given


def _content(name: str, content: Any) -> str | None:
    """A message's text; parts are joined by newlines, as vLLM does for templates that take strings."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{name}.content must be a string or a list of parts, not {show(content)}")
    return "\n".join(_part(name, part) for part in content)


def _part(name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(TEXT_PARTS[kind]) if isinstance(kind, str) and kind in TEXT_PARTS else None
    if not isinstance(text, str):
        raise ValueError(f"{name}.content holds {show(part)}: only text parts are supported")
    return text


def _with_objects(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with arguments of tool calls, in OpenAI's format a text of JSON, as objects, as in vLLM's server.

    Most templates (Qwen, Llama 3, Hermes) write them with `tojson`, which would encode a text once more.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_tool_call(f"{name}.tool_calls[{at}]", call) for at, call in enumerate(calls)]}


def _tool_call(name: str, call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    text = function.get("arguments") or "{}"
    if not isinstance(text, str):
        return call
    name += ".function.arguments"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}={show(text)} is not valid JSON: {first_line(error)}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{name}={show(text)} must be a JSON object")
    return call | {"function": function | {"arguments": arguments}}


def _holds_dicts(text: str, messages: list[dict[str, Any]]) -> bool:
    """Whether a template wrote arguments of tool calls as Python shows them: it puts in what it takes for text."""
    listed = [calls for message in messages if isinstance(calls := message.get("tool_calls"), list)]
    functions = [call.get("function") for calls in listed for call in calls if isinstance(call, dict)]
    shown = [str(function.get("arguments")) for function in functions if isinstance(function, dict)]
    return any("'" in arguments and arguments in text for arguments in shown)


def _string(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {show(value)}")
    return value


def _objects(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{key} must be a list of objects, not {show(value)}")
    return value


# Keys of a chat row that are variables of its template: documents and reasoning_effort as in vLLM's server;
# enable_thinking is one of Qwen3's template and its relatives, which other servers take beside the messages, too.
TEMPLATE_KEYS: dict[str, Callable[[str, Any], Any]] = {
    "documents": _objects,
    "enable_thinking": boolean,
    "reasoning_effort": _string,
}
