"""What a row carries through to its answer: `metadata`, a value of the user's own that nothing here looks into."""

import json
from collections.abc import Mapping
from typing import Any


def metadata_of(data: Mapping[str, Any]) -> str:
    """A row's metadata as JSON; empty if it has none, or null. Fails for no row that could be read.

    NaN and infinity, which Python reads and writes but JSON lacks, become null. What is nested so deeply that it can
    only just be read is left out.
    """
    value = data.get("metadata")
    if value is None:
        return ""
    try:
        return _written(value)
    except ValueError:
        return _written(json.loads(json.dumps(value), parse_constant=lambda _: None))
    except RecursionError:
        return ""


def _written(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs stay the escapes that they were
        return json.dumps(value)
    return text
