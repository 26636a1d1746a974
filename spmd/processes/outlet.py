"""The process that writes a leader's answers, and the leader's end of the line to it.

Who writes, who reads, what orders them: the leader's loop alone sends, and what it sends is read in that order. The
process alone writes the replica's part. What the line has taken is written even if the leader is killed then, for the
process goes on until it has read all and finds the line's end. Rows that are lost with either of them are not in the
part, so the next start answers them.

What ends with one plan travels as one list. Sending doesn't wait: what the line doesn't take at once is kept, and sent
with what comes behind it. Only where the writer is a long way behind does the loop wait for it.
"""

import os
import pickle
from collections import deque
from contextlib import suppress
from socket import MSG_DONTWAIT, SHUT_WR, socket, socketpair
from typing import Any

from spmd.api.answers import Finished, Head
from spmd.api.rows import BadRow
from spmd.api.tokenizer import load_tokenizer
from spmd.journal.format import Header
from spmd.journal.writer import PartWriter
from spmd.messages import Mistake, first_line
from spmd.processes.answer_writer import AnswerWriter
from spmd.processes.child import fork

MOST_KEPT = 64 * 2**20  # bytes


class Outlet:
    """Make it before there are threads or a GPU; a context manager, which leaves when all that was sent is written.

    Raises:
        Mistake: from any call, what the user can mend, see `PartWriter`.
        RuntimeError: from any call, the process is gone.
    """

    def __init__(self) -> None:
        self._socket, theirs = socketpair()
        self._replies = self._socket.makefile("rb")
        self._ended: list[tuple[Any, ...]] = []  # since the last flush: an `AnswerWriter`'s method, and its arguments
        self._kept: deque[memoryview] = deque()  # what is to be sent
        self._num_kept = 0  # bytes
        self._pid = fork(lambda: _serve(theirs), theirs.fileno())
        theirs.close()

    def load(self, tokenizer: str | None, revision: str | None) -> None:
        """Have a tokenizer loaded, a folder's or Hub id's; None: there is none. Doesn't wait for it."""
        self._send((tokenizer, revision))
        self.flush()

    def open(self, output: str, dp_rank: int, header: Header, model: str) -> None:
        """Make the part of a replica; answers name the `model`."""
        self._send((output, dp_rank, header, model))
        self._reply()

    def choice(self, row: int, number: int, finished: Finished) -> None:
        """As `AnswerWriter.choice`."""
        self._ended.append(("choice", row, number, finished))

    def answer(self, head: Head) -> None:
        """As `AnswerWriter.answer`."""
        self._ended.append(("answer", head))

    def error(self, row: BadRow) -> None:
        """As `AnswerWriter.error`."""
        self._ended.append(("error", row))

    def flush(self, most: int = MOST_KEPT) -> None:
        """Send what can be sent at once; wait only where more than `most` bytes are left."""
        if self._ended:
            self._send(self._ended)
            self._ended = []
        while self._kept:
            try:
                sent = self._socket.send(self._kept[0], MSG_DONTWAIT if self._num_kept <= most else 0)
            except BlockingIOError:
                return
            except OSError:
                self._fail()
            self._num_kept -= sent
            if sent < len(self._kept[0]):
                self._kept[0] = self._kept[0][sent:]
            else:
                self._kept.popleft()

    def close(self) -> int:
        """Wait until all answers are on the disk.

        Returns:
            How many of the rows that were to be answered got an error line.
        """
        self.flush()
        self._send(None)
        failed: int = self._reply()
        return failed

    def __enter__(self) -> "Outlet":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Mistake, RuntimeError, OSError):
            self.flush(most=0)
            self._socket.shutdown(SHUT_WR)
        os.waitpid(self._pid, 0)
        self._replies.close()
        self._socket.close()

    def _send(self, message: Any) -> None:
        packed = memoryview(pickle.dumps(message))
        self._kept.append(packed)
        self._num_kept += len(packed)

    def _reply(self) -> Any:
        self.flush(most=0)
        try:
            reply = pickle.load(self._replies)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError("the process that writes the answers is gone; was it killed for memory?") from error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _fail(self) -> None:
        """The line is broken: raise what the process said last."""
        self._kept.clear()
        self._num_kept = 0
        self._reply()


def _serve(line: socket) -> None:
    """All that the process does."""
    messages = line.makefile("rb")
    try:
        _write(messages, line)
    except (EOFError, pickle.UnpicklingError):
        pass  # the rank has ended, within a message perhaps
    except Mistake as error:
        line.sendall(pickle.dumps(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        line.sendall(pickle.dumps(RuntimeError(f"answers can't be written: {reason}")))


def _write(messages: Any, line: socket) -> None:
    path, revision = pickle.load(messages)
    tokenizer = None if path is None else load_tokenizer(path, revision)
    output, dp_rank, header, model = pickle.load(messages)
    with PartWriter(output, dp_rank, header) as part:
        line.sendall(pickle.dumps(None))
        writer = AnswerWriter(tokenizer, model, part.write)
        while ended := pickle.load(messages):
            for name, *args in ended:
                getattr(writer, name)(*args)
        part.close()
        line.sendall(pickle.dumps(writer.close()))
