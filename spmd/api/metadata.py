"""What a row carries through to its answer: `metadata`, a value of the user's own that nothing here looks into."""

import json
from collections.abc import Mapping
from typing import Any

from spmd.formats.column_values import json_text


def metadata_of(data: Mapping[str, Any]) -> str:
    """A row's metadata as JSON; empty if it has none, or null. Fails for no row that could be read.

    NaN and infinity, which Python reads and writes but JSON lacks, become null. What is nested so deeply that it can
    only just be read is left out.
    """
    value = data.get("metadata")
    if value is None:
        return ""
    try:
        return json_text(value)
    except ValueError:
        return json_text(json.loads(json.dumps(value), parse_constant=lambda _: None))
    except RecursionError:
        return ""
