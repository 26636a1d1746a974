"""From the rows of a table to lines of JSON: which column holds the prompt, which are keys, and what is carried."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spmd.formats.column_values import to_json
from spmd.formats.tables import Table, pyarrow
from spmd.messages import Mistake, listed

MOST_NAMED = 8  # columns in a message
MEANT = ("messages", "prompt", "body")  # columns that hold the prompt by their names


@dataclass(frozen=True)
class Columns:
    """How the columns of tables are taken."""

    prompt: str | None  # the name of the one with the prompts; None: one of MEANT
    keys: Mapping[str, frozenset[str]]  # by the key that a prompt stands under, names of columns that stand beside it


@dataclass(frozen=True)
class Roles:
    """What the columns of one table are."""

    column: str  # that holds the prompts
    prompt: str  # the key that they stand under in a row: one of MEANT
    beside: tuple[str, ...]  # columns that are keys of the row
    carried: tuple[str, ...]  # all others

    def __str__(self) -> str:
        keys = f"; keys of rows are {', '.join(self.beside)}" if self.beside else ""
        carried = f"; carried through are {listed(self.carried, MOST_NAMED)}" if self.carried else ""
        return f"{self.prompt} from column {self.column}{keys}{carried}"


def roles_of(path: str, schema: Any, columns: Columns) -> Roles:
    """What the columns of a table are, by their names and, of the one with the prompts, its type.

    Raises:
        Mistake: there is no column of prompts, more than one that may be, or what it holds are none.
    """
    names: list[str] = schema.names
    there = f"its columns are {listed(names, MOST_NAMED)}"
    if len(set(names)) < len(names):
        raise Mistake(f"input={path} has columns of the same name: {there}")
    if columns.prompt is not None:
        if columns.prompt not in names:
            raise Mistake(f"input={path} has no column input_column={columns.prompt}; {there}")
        column = columns.prompt
    else:
        found = [name for name in MEANT if name in names]
        if len(found) != 1:
            what = f"columns {' and '.join(found)}" if found else f"no column {', '.join(MEANT)}"
            raise Mistake(f"input={path} has {what}: input_column=NAME says which holds the prompts; {there}")
        (column,) = found
    fits = _key_for(path, column, schema.field(column).type)
    prompt = column if column in MEANT else fits
    known = columns.keys[prompt] - {*MEANT}
    beside = tuple(name for name in names if name in known | {"custom_id"} and name != column)
    return Roles(column, prompt, beside, tuple(name for name in names if name not in (column, *beside)))


def table_lines(path: str, columns: Columns) -> Iterator[bytes]:
    """A line for each row of a table, in blocks.

    Raises:
        Mistake: as `roles_of`.
        OSError: the table can't be read to its end.
    """
    table = Table(path)
    roles = roles_of(path, table.schema, columns)
    for batch in table.batches():
        values = {name: batch.column(name).to_pylist() for name in (roles.column, *roles.beside)}
        carried = {name: to_json(batch.column(name)) for name in roles.carried}
        rows = (_row(roles, values, carried, number) for number in range(batch.num_rows))
        yield b"".join(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n" for row in rows)


def _row(roles: Roles, values: Mapping[str, Any], carried: Mapping[str, Any], number: int) -> dict[str, Any]:
    row = {name: _key(values[name][number]) for name in roles.beside}
    if row.get("custom_id") is not None:
        row["custom_id"] = str(row["custom_id"])
    row[roles.prompt] = _prompt(roles.prompt, values[roles.column][number])
    row = {name: value for name, value in row.items() if value is not None}
    if carried:
        row["metadata"] = {name: of_column[number] for name, of_column in carried.items()}
    return row


def _key_for(path: str, column: str, kind: Any) -> str:
    """The key for prompts of a column's type: messages are structs in a list, a body is one, all else is a prompt.

    Raises:
        Mistake: it is neither text, nor a list, nor a struct.
    """
    types = pyarrow("a column").types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return "body"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "messages" if types.is_struct(kind.value_type) else "prompt"
    if types.is_string(kind) or types.is_large_string(kind):
        return "prompt"
    raise Mistake(f"input={path}: column {column} is {kind}, not text, token ids, messages or bodies")


def _prompt(key: str, value: Any) -> Any:
    """`messages` and `body` may be written as JSON; what is none fails its row."""
    if key != "prompt" and isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return _given(value)


def _key(value: Any) -> Any:
    """A key's value. Numbers that are missing are often NaN."""
    return None if isinstance(value, float) and math.isnan(value) else _given(value)


def _given(value: Any) -> Any:
    """Without the nulls of structs, in which every row has every key."""
    if isinstance(value, dict):
        return {key: _given(each) for key, each in value.items() if each is not None}
    return [_given(each) for each in value] if isinstance(value, list) else value
