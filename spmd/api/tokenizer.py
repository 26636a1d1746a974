"""Between text and tokens: loading the tokenizer, the text of an output, and stop strings while it grows."""

import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from spmd.api.token_bytes import UNFINISHED, decode, finished_text
from spmd.messages import check_no_pointer, first_line
from spmd.schedule.request import SamplingParams

# Prompt tokens decoded in front of an output: SentencePiece drops the space before the first word it decodes.
CONTEXT = 6
MOST_CONTEXT = 24  # where fewer begin within a character
MOST_PENDING = 16  # tokens without a whole character behind which none will come: a character has four bytes
TOKENIZER_FILES = ("tokenizer", "tokenization", "vocab", "spiece", "sentencepiece", "tekken")
BESIDE = ("merges", "special_tokens_map", "added_tokens", "chat_template")  # files of a tokenizer too
BYTES = 256  # tokens of the smallest tokenizer that needs no vocabulary, ByT5's, and some more


def load_tokenizer(path: str, revision: str | None = None, now: datetime | None = None) -> Any | None:
    """The tokenizer of a folder or Hub id; None for a folder without one, where prompts must be token ids.

    `now` is what chat templates that write the date shall take for it: read on every rank by itself, the clock would
    give ranks different prompts around midnight.

    Raises:
        ValueError: one line that names the path and the reason.
    """
    names = sorted(os.listdir(path)) if os.path.isdir(path) else None
    if names is not None and not any(name.startswith(TOKENIZER_FILES) for name in names):
        return None
    for name in names or ():
        if name.startswith((*TOKENIZER_FILES, *BESIDE)):
            check_no_pointer(Path(path, name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and json's
        raise ValueError(f"no tokenizer could be loaded from {path}: {_lacking(path) or first_line(error)}") from error
    own = [name for name in names or () if name.startswith(TOKENIZER_FILES)]
    if own == ["tokenizer_config.json"] and tokenizer.vocab_size < BYTES:  # transformers makes an empty one
        raise ValueError(
            f"{path} has tokenizer_config.json, but no vocabulary: tokenizer.json or tokenizer.model is lost"
        )
    template = tokenizer.chat_template
    if now and isinstance(template, dict):
        tokenizer.chat_template = {name: _dated(text, now) for name, text in template.items()}
    elif now and template:
        tokenizer.chat_template = _dated(template, now)
    return tokenizer


def _lacking(path: str) -> str:
    """What a vocabulary of SentencePiece alone needs, where transformers speaks of tiktoken; empty without one."""
    file = Path(path, "tokenizer.model")
    if not file.is_file() or file.with_suffix(".json").is_file() or not file.read_bytes().startswith(b"\n"):
        return ""
    packages = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    lacking = [name for name, there in packages.items() if not there]
    how = f"pip install {' '.join(lacking)}, or put its tokenizer.json beside it"
    return f"tokenizer.model needs {' and '.join(lacking)}: {how}" if lacking else ""


def _dated(template: str, now: datetime) -> str:
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(now.strftime(call[2])), template)


def load_generation_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """Content of generation_config.json of a folder or Hub id; without one, config.json's eos_token_id alone.

    Raises:
        ValueError: one line that names the file and the reason.
    """
    generation_config = _load_json(path, "generation_config.json", revision)
    if generation_config is not None:
        return generation_config
    return {"eos_token_id": (_load_json(path, "config.json", revision) or {}).get("eos_token_id")}


def output_text(tokenizer: Any, prompt: Sequence[int], output: Sequence[int], skip_special_tokens: bool) -> str:
    """Text of `output` where it stands: behind `prompt`. Empty without a tokenizer.

    A character that `output` ends in the middle of is left out, as in vLLM; one that the prompt has begun is in it.
    """
    if tokenizer is None:
        return ""
    return _text_behind(tokenizer, _context(tokenizer, prompt, skip_special_tokens), output, skip_special_tokens)


def _text_behind(tokenizer: Any, context: Sequence[int], output: Sequence[int], skip_special_tokens: bool) -> str:
    """As `output_text`, with a context that begins with a whole character."""
    whole = finished_text(tokenizer, [*context, *output], skip_special_tokens)
    for text_of in (decode, finished_text):  # the context may end within a character that the output completes
        before = text_of(tokenizer, context, skip_special_tokens)
        if whole.startswith(before):
            return whole[len(before) :]
    return finished_text(tokenizer, output, skip_special_tokens)


def _context(tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool) -> list[int]:
    """The last tokens of a prompt, as many as are needed to begin with a whole character.

    With byte fallback a broken character spoils all bytes behind it. vLLM, too, takes the shortest end of the prompt
    whose text is without U+FFFD; where there is none, the prompt holds some itself.
    """
    for size in range(CONTEXT, min(len(prompt), MOST_CONTEXT) + 1):
        context = list(prompt[-size:])
        if UNFINISHED not in finished_text(tokenizer, context, skip_special_tokens):
            return context
    return list(prompt[-CONTEXT:])


class StopChecker:
    """Looks for `params.stop` in the text of one growing output. Each token costs the decoding of a few.

    The text is that of `output_text`, but for what bytes that come later may still spoil (with byte fallback, those of
    one row of bytes together). Where a stop string is found in it, `text` is made anew from all tokens, and the string
    must be there, too.

    A stop string that is complete within the first `min_tokens` doesn't count, as in vLLM.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], params: SamplingParams) -> None:
        self.tokenizer = tokenizer
        self.params = params
        self.text = ""  # of the output so far; ends before (or behind) the stop string once there is one
        self.context = _context(tokenizer, prompt, params.skip_special_tokens)
        self.output: list[int] = []
        # `settled` is the text up to the first `shown` of these tokens, on which the text of the others may depend.
        self.settled = ""
        self.tokens = [*self.context]
        self.shown = len(self.tokens)

    def push(self, token: int) -> str | None:
        """Append a sampled token; the stop string that ends the output with it, if one does."""
        self.output.append(token)
        old = len(self.text)
        self.text = self._grown(token)
        if len(self.text) <= old or len(self.output) <= self.params.min_tokens or not self._find(self.text, old):
            return None
        whole = output_text(self.tokenizer, self.context, self.output, self.params.skip_special_tokens)
        if not (found := self._find(whole, old)):
            return None
        at, order = found
        stop = self.params.stop[order]
        self.text = whole[: at + len(stop) if self.params.include_stop_str_in_output else at]
        return stop

    def _find(self, text: str, old: int) -> tuple[int, int] | None:
        """Where the first stop string that isn't in the first `old` characters begins, and which of them it is."""
        found = []
        for order, stop in enumerate(self.params.stop):
            if (at := text.find(stop, max(0, old - len(stop) + 1))) >= 0:
                found.append((at, order))
        return min(found, default=None)

    def _grown(self, token: int) -> str:
        """The text with one more token."""
        skip = self.params.skip_special_tokens
        self.tokens.append(token)
        whole = decode(self.tokenizer, self.tokens, skip)
        before = decode(self.tokenizer, self.tokens[: self.shown], skip)
        if whole == before and not decode(self.tokenizer, [token], skip):
            self.tokens.pop()  # a skipped token: no text will ever depend on it
            return self.text
        open_ended = whole.endswith(UNFINISHED)
        if open_ended or not whole.startswith(before):
            new = _text_behind(self.tokenizer, self.tokens[: self.shown], self.tokens[self.shown :], skip)
        else:
            new = whole[len(before) :]
        text = self.settled + new
        many = len(self.tokens) - self.shown > MOST_PENDING
        if many or (new and not open_ended):
            self.settled = text
            if many or not before.endswith(UNFINISHED):  # else the new ones begin within a character
                del self.tokens[: self.shown]
            self.shown = len(self.tokens)
        return text


def _load_json(path: str, name: str, revision: str | None) -> dict[str, Any] | None:
    try:
        file = os.path.join(path, name) if os.path.isdir(path) else hf_hub_download(path, name, revision=revision)
        check_no_pointer(Path(file))
        with open(file, encoding="utf-8") as handle:
            content = json.load(handle)
    except (EntryNotFoundError, FileNotFoundError):
        return None
    except Exception as error:  # of the Hub's client, its HTTP library, the file system or json
        raise ValueError(f"{name} of {path} could not be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} of {path} is not a JSON object")
    return content
