"""An output as a Parquet file: made of the finished answers at the end, in one step for whoever looks.

While a run works, and for later ones to go on from, the answers are JSON lines beside it, `<output>.jsonl`, with a
journal and all. The table says in its metadata which answers it was made of: by that the next start sees whether it is
there, and a run that was cut while it made one makes it again.
"""

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from spmd.formats.column_values import from_json, json_text, type_behind
from spmd.formats.content import is_table_file
from spmd.formats.sources import Source
from spmd.formats.table_rows import Columns, roles_of
from spmd.formats.tables import Table, pyarrow
from spmd.messages import Mistake, cannot_write, first_line

ENDING = ".parquet"
MADE_OF = b"spmd.answers"  # under which a table says so
OWN = ("custom_id", "text", "finish_reason", "error", "response")
ROWS, BYTES = 10_000, 2**26  # of answers in a row group, whichever comes first
Answer = dict[str, Any]


def answers_of(output: str) -> str:
    """The file of answers as JSON lines: the output itself, or what lies beside a table."""
    return f"{output}.jsonl" if output.lower().endswith(ENDING) else output


def check_table(output: str, inputs: Sequence[str], errors: str | None, fresh: bool = False) -> None:
    """Check, before anything is answered, that a table can be made at the end and replaces no file of somebody else.

    Raises:
        Mistake: pyarrow is missing; it is the input or the file of errors, or was made by no run; its answers are gone.
    """
    pyarrow(f"output={output}")
    path, answers = Path(output).resolve(), answers_of(output)
    if path in (Path(input).resolve() for input in inputs):
        raise Mistake(f"output={output} is the input: it would be overwritten")
    if errors and Path(errors).resolve() == path:
        raise Mistake(f"errors={errors} is the output: choose another file")
    if fresh or not path.exists():
        return
    if not path.is_file() or _made_of(path) is None:
        raise Mistake(f"output={output} exists and was made by no run: choose another output, or resume=fresh")
    if not Path(answers).exists() and not Path(f"{answers}.parts").exists():
        raise Mistake(
            f"output={output} is there, but {answers} is not, which holds its answers for later starts: put it back, "
            f"or resume=fresh to answer everything anew"
        )


def carried_schema(sources: Sequence[Source], columns: Columns) -> Any | None:
    """Names and types of the columns that tables carry through; None where not all inputs are tables.

    Raises:
        Mistake: tables have columns of the same name and types that don't go together.
        OSError: one can't be read.
    """
    arrow, schemas = pyarrow("the output"), []
    for source in sources:
        if not is_table_file(source):
            return None
        schema = Table(source.path).schema
        carried = roles_of(source.path, schema, columns).carried
        schemas.append(arrow.schema([(name, type_behind(schema.field(name).type)) for name in carried]))
    try:
        return arrow.unify_schemas(schemas, promote_options="permissive")
    except arrow.ArrowException as error:
        raise Mistake(f"the tables of the input don't go together: {first_line(error)}") from error


def make_table(answers: Path, keys: Path, output: Path, carried: Any | None) -> None:
    """Replace the table at once by one of these answers, if it isn't made of them already.

    Args:
        answers: JSON lines, of a finished run; `keys`: its file of keys, which tells them from others.
        carried: names and types of columns that stand in the answers' metadata; None: that becomes a column of JSON.

    Raises:
        Mistake: the disk is full, say; the answers are safe and the next start makes it.
    """
    made_of = _digest(keys)
    if output.exists() and _made_of(output) == made_of:
        return
    anew = output.with_name(output.name + ".new")
    try:
        _write(anew, answers, carried, made_of)
        os.replace(anew, output)
    except OSError as error:
        why = cannot_write(f"output={output}", output.parent, error)
        raise Mistake(f"{why}; all answers are in {answers}: mend that, then start again to have the table") from error
    finally:
        anew.unlink(missing_ok=True)


def _write(path: Path, answers: Path, carried: Any | None, made_of: bytes) -> None:
    arrow = pyarrow("the output")
    fields = [(name, arrow.string()) for name in OWN]
    names = _free_names(["metadata"] if carried is None else carried.names)
    types = [arrow.string()] if carried is None else carried.types
    schema = arrow.schema([*fields, *zip(names, types, strict=True)], {MADE_OF: made_of})
    with open(path, "wb") as file:
        with arrow.parquet.ParquetWriter(file, schema) as writer:
            for group in _groups(answers):
                more = _metadata(group, carried)
                columns = [*_own_columns(group), *more]
                writer.write_table(arrow.Table.from_arrays(columns, schema=schema))
        file.flush()
        os.fsync(file.fileno())


def _groups(answers: Path) -> Iterator[list[Answer]]:
    group: list[Answer] = []
    size = 0
    with open(answers, "rb") as file:
        for line in file:
            group.append(json.loads(line))
            size += len(line)
            if len(group) >= ROWS or size >= BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def _own_columns(group: Sequence[Answer]) -> list[Any]:
    """The columns of OWN."""
    arrow = pyarrow("the output")
    return [arrow.array(column, arrow.string()) for column in zip(*map(_own, group), strict=True)]


def _own(answer: Answer) -> tuple[str | None, ...]:
    """Text and finish reason are of the first choice; all choices are in the response."""
    body = (answer["response"] or {}).get("body")
    choice = (body or {}).get("choices", [{}])[0]
    text = choice["message"]["content"] if "message" in choice else choice.get("text")
    message = answer["error"] and answer["error"]["message"]
    return (
        answer["custom_id"],
        text,
        choice.get("finish_reason"),
        message,
        body and json_text(body),
    )


def _metadata(group: Sequence[Answer], carried: Any | None) -> list[Any]:
    """The columns that were carried through."""
    arrow, values = pyarrow("the output"), [answer.get("metadata") for answer in group]
    if carried is None:
        texts = [None if value is None else json_text(value) for value in values]
        return [arrow.array(texts, arrow.string())]
    found = []
    for field in carried:
        of_column = [(value or {}).get(field.name) for value in values]
        try:
            found.append(from_json(of_column, field.type))
        except arrow.ArrowException as error:
            raise OSError(f"its column {field.name}, {field.type}: {first_line(error)}") from error
    return found


def _free_names(names: Sequence[str]) -> list[str]:
    """The names, those of OWN with as many `_` behind them as make them nobody else's."""
    taken, free = {*OWN, *names}, []
    for name in names:
        if name in OWN:
            while name in taken:
                name += "_"
            taken.add(name)
        free.append(name)
    return free


def _digest(keys: Path) -> bytes:
    """Of the answers that a file of keys is of, without its header, which tells of the run."""
    digest = blake2b(digest_size=16)
    with open(keys, "rb") as file:
        file.readline()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest().encode()


def _made_of(table: Path) -> bytes | None:
    """Of which answers a file says that it was made; None if it says nothing, or is no table."""
    try:
        metadata: dict[bytes, bytes] = Table(str(table)).schema.metadata or {}
    except OSError:
        return None
    return metadata.get(MADE_OF)
