"""Makes the lines of finished rows, and hands them to whoever writes them."""

from collections.abc import Callable
from typing import Any

from spmd.api.answers import Finished, Head, answer_line, complete, error_line
from spmd.api.choices import Completion
from spmd.api.rows import SERVER_ERROR, BadRow
from spmd.messages import first_line

Write = Callable[[int, str, int | None, bool], None]  # (row, line, key, whether it is an error)


class AnswerWriter:
    """Takes the choices of a row as they end, then the row itself. Whatever fails in between fails that row alone.

    `failed` counts the rows that were to be answered and got an error line.
    """

    def __init__(self, tokenizer: Any, model: str, write: Write) -> None:
        """`model`: its name in the answers."""
        self.tokenizer = tokenizer
        self.model = model
        self.write = write
        self.failed = 0
        self._completions: dict[int, dict[int, Completion]] = {}  # of rows that aren't whole, by number of the choice
        self._failures: dict[int, str] = {}  # rows of which a choice couldn't be had, and why

    def choice(self, row: int, number: int, finished: Finished) -> None:
        """Choice `number` of a row has ended."""
        try:
            self._completions.setdefault(row, {})[number] = complete(self.tokenizer, finished)
        except Exception as error:  # a tokenizer's own affair
            self._failures.setdefault(row, first_line(error))

    def answer(self, head: Head) -> None:
        """All choices of a row have ended: write its answer."""
        completions, failure = self._completions.pop(head.row, {}), self._failures.pop(head.row, "")
        try:
            if failure:
                raise ValueError(failure)
            in_order = [completions[number] for number in sorted(completions)]
            line = answer_line(head, in_order, self.model, self.tokenizer)
        except Exception as error:
            self.failed += 1
            reason = f"the answer can't be put together: {first_line(error)}"
            self.error(BadRow(head.row, head.custom_id, reason, SERVER_ERROR, head.key, head.metadata))
        else:
            self.write(head.row, line, head.key, False)

    def error(self, row: BadRow) -> None:
        """Write down why a row has no answer."""
        self._completions.pop(row.index, None)
        self._failures.pop(row.index, None)
        self.write(row.index, error_line(row), row.key, True)

    def flush(self) -> None:
        """All is written already."""

    def close(self) -> int:
        """How many of the rows that were to be answered got an error line."""
        return self.failed
