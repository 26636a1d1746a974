"""Values of a table's columns on their way through JSON and back into a table.

What JSON can say keeps its type: booleans, numbers, strings, lists and structs of them. Timestamps, dates and decimals
travel as text, bytes as base64, and get their type back. All else (times of day, durations, maps, structs that hold
bytes) becomes text and stays that. NaN and infinity become null.
"""

import base64
import json
from typing import Any

from spmd.formats.tables import pyarrow


def json_text(value: Any) -> str:
    """A value as JSON that can be encoded: halves of surrogate pairs, which are no text, stay the escapes they were.

    Raises:
        ValueError: it holds NaN or infinity, which JSON lacks.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def to_json(column: Any) -> list[Any]:
    """The values of an Arrow array as JSON can hold them."""
    arrow = pyarrow("a column")
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if _is_json(kind):
        return _list(column)
    if _is_text(kind):
        return _list(column.cast(arrow.string()))
    if _is_bytes(kind):
        return [None if value is None else base64.b64encode(value).decode() for value in column.to_pylist()]
    return [None if value is None else _text_of(value) for value in column.to_pylist()]


def from_json(values: list[Any], kind: Any) -> Any:
    """An Arrow array of such values, of the type that `type_behind` gives for `kind`.

    Raises:
        pyarrow.ArrowException: they don't come from such a column.
    """
    arrow = pyarrow("a column")
    if _is_text(kind):
        return arrow.array(values, arrow.string()).cast(kind)
    if _is_bytes(kind):
        return arrow.array([None if value is None else base64.b64decode(value) for value in values], kind)
    return arrow.array(values, type_behind(kind))


def type_behind(kind: Any) -> Any:
    """The type that a column has once it went through JSON."""
    types = pyarrow("a column").types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return kind if _is_json(kind) or _is_text(kind) or _is_bytes(kind) else pyarrow("a column").string()


def _is_json(kind: Any) -> bool:
    types = pyarrow("a column").types
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(number).type) for number in range(kind.num_fields))
    known = (
        types.is_null,
        types.is_boolean,
        types.is_integer,
        types.is_floating,
        types.is_string,
        types.is_large_string,
    )
    return any(check(kind) for check in known)


def _is_text(kind: Any) -> bool:
    types = pyarrow("a column").types
    return any(check(kind) for check in (types.is_timestamp, types.is_date, types.is_decimal))


def _is_bytes(kind: Any) -> bool:
    types = pyarrow("a column").types
    return any(check(kind) for check in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary))


def _list(column: Any) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return values


def _text_of(value: Any) -> str:
    return json.dumps(value, default=_shown) if isinstance(value, list | dict) else str(value)


def _shown(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
