"""Requests that wait for a seat: in order, except that long prompts let ordinary ones go first.

A prompt that is far longer than others would slow all that run beside it: its chunks fill their ticks, and in each tick
its keys and values are read besides theirs. So it stands aside until few ordinary requests are left at its replica.
What is far longer is judged by the prompts that came so far. In a file where such prompts are usual none is, and a
bounded number of rows stands aside: then the first of them is next in its turn. All of it is a function of the
requests in their order, so the copies of a scheduler agree on it.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Any

from spmd.schedule.request import Request

FAR_LONGER = 4  # doublings of the geometric mean of all prompts: 16 times as long
MOST_ASIDE = 64  # rows
FEW = 16  # the part of the seats that ordinary requests may have beside long ones


class Waiting:
    def __init__(self, order: Callable[[Request], Any], long_prompt: int, max_num_seqs: int) -> None:
        """`long_prompt`: tokens of a prompt up to which it never stands aside; 0: none does."""
        self.order = order
        self.long_prompt = long_prompt
        self.few = max_num_seqs // FEW
        self.queue: list[Request] = []  # by order
        self.aside: list[Request] = []  # likewise
        self.rows_aside = 0  # of which nobody is seated
        self.came = 0  # requests so far
        self.prompts = 0  # of these
        self.doublings = 0  # binary digits of their lengths, added up

    def __iter__(self) -> Iterator[Request]:
        yield from self.queue
        yield from self.aside

    def come(self, request: Request) -> None:
        """A request is new."""
        request.turn = self.came
        self.came += 1
        if request.choice == 0:
            self.prompts += 1
            self.doublings += request.prompt_len.bit_length()
        self.add(request)

    def add(self, request: Request) -> None:
        """A request waits, for the first time or again."""
        insort(self.queue, request, key=self.order)

    def line(self, ordinary: int) -> list[Request]:
        """Those whose first is next, while so many ordinary requests have seats."""
        while self.queue and self._is_far_longer(self.queue[0]):
            self._step_aside(self.queue.pop(0))
        if not self.aside:
            return self.queue
        if self.rows_aside > MOST_ASIDE:
            return min((line for line in (self.queue, self.aside) if line), key=lambda line: self.order(line[0]))
        return self.queue if self.queue or ordinary > self.few else self.aside

    def pop(self, line: list[Request]) -> Request:
        """The first of a line, which gets a seat."""
        request = line.pop(0)
        self.rows_aside -= line is self.aside and request.choice == 0
        return request

    def _step_aside(self, request: Request) -> None:
        request.aside = True
        self.rows_aside += request.choice == 0
        insort(self.aside, request, key=self.order)

    def _is_far_longer(self, request: Request) -> bool:
        length = request.prompt_len
        if not self.long_prompt or length <= self.long_prompt:
            return False
        return length.bit_length() * self.prompts >= self.doublings + FAR_LONGER * self.prompts
