"""Where sampled tokens go: the leader of a replica decides when a request ends, and tells the other ranks.

One packet for each plan carries that. The leader also sends on what has ended, to be written, and keeps the clock.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from spmd.api.answers import Finished, Head
from spmd.api.rows import SERVER_ERROR, BadRow, Job
from spmd.api.tokenizer import StopChecker
from spmd.parallel.packet import Packet, PacketWire
from spmd.report.metrics import Clock, Metrics
from spmd.sampling.sampler import Sampled
from spmd.schedule.plan import Plan
from spmd.schedule.request import NO_TOKEN, Request, SamplingParams
from spmd.signals import Stop


class Answers(Protocol):
    """Where a leader sends what has ended: `spmd.processes.outlet`, or nowhere."""

    def choice(self, row: int, number: int, finished: Finished) -> None:
        """Choice `number` of a row has ended."""

    def answer(self, head: Head) -> None:
        """All choices of a row have ended."""

    def error(self, row: BadRow) -> None:
        """A row has no answer."""

    def flush(self) -> None:
        """Let go what was sent. Called once for each plan that is committed."""

    def close(self) -> int:
        """All rows have ended; returns how many of those that were to be answered couldn't be."""


class Unwritten:
    """Nobody asks for the answers: a benchmark."""

    def choice(self, row: int, number: int, finished: Finished) -> None: ...

    def answer(self, head: Head) -> None: ...

    def error(self, row: BadRow) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> int:
        return 0


@dataclass(slots=True)
class Open:
    """A row that isn't answered yet."""

    job: Job
    left: int  # choices that aren't finished
    failure: BadRow | None = None  # why it will have no answer


@dataclass(slots=True)
class Choice:
    """What is kept of a request until its last token is committed."""

    row: Open
    clock: Clock
    checker: StopChecker | None
    ends: frozenset[int]  # token ids that end it
    logprobs: "array[float]" = field(default_factory=lambda: array("d"))  # as `Sampled.fetch` gives them, in a row
    finish_reason: str | None = None  # None: it goes on
    once_more_at: int = -1  # the position of the token that it is computed once more for, if it is
    stop_reason: int | str | None = None


class Leader:
    def __init__(self, tokenizer: Any, metrics: Metrics, answers: Answers | None = None) -> None:
        """`tokenizer`: for stop strings."""
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.answers = answers or Unwritten()
        self.rows: dict[int, Open] = {}
        self.choices: dict[Request, Choice] = {}
        self.waited = 0.0  # seconds for samples

    def open(self, row: Job | BadRow) -> None:
        """A row came in: open it, or send on at once why it can't be answered."""
        if isinstance(row, BadRow):
            self.metrics.rows_failed += 1
            self.answers.error(row)
            return
        now = perf_counter()
        opened = self.rows[row.index] = Open(row, len(row.requests))
        for request in row.requests:
            params = request.params
            checker = StopChecker(self.tokenizer, request.prompt.tokens, params) if params.stop else None
            self.choices[request] = Choice(opened, Clock(now), checker, _ends(params))

    def judge(self, plan: Plan, sampled: Sampled) -> tuple[list[int], list[bool]]:
        """A token for each of `plan.sampled`, and whether the request has ended. Plans come in order.

        A request that ended in an earlier plan is passed over: this one was made before that was known. It has a
        finish reason then, or is none of `choices` any more, since its last token is committed.

        One with NO_TOKEN is computed once more, alone. If it gets that again, its row fails: it ends, and so do the
        row's other choices, each where its next token is judged.
        """
        asked = perf_counter()
        tokens, logprobs = sampled.fetch()
        now, clocks, ended = perf_counter(), [], [False] * len(tokens)
        self.waited += now - asked
        rows = zip(plan.sampled, tokens, plan.sample_positions, strict=True)
        for place, (request, token, position) in enumerate(rows):
            choice = self.choices.get(request)
            if choice is None or (choice.finish_reason is not None and position != choice.once_more_at):
                ended[place] = True
                continue
            if token == NO_TOKEN or choice.row.failure:
                ended[place] = self._fails(request, choice, position)
                continue
            choice.finish_reason = None
            clocks.append(choice.clock)
            if logprobs and (chosen := logprobs[place]):
                choice.logprobs.extend(chosen)
            if token in choice.ends or choice.checker or position >= request.full_length:
                choice.finish_reason = _finish_reason(request, choice, token, position)
                ended[place] = choice.finish_reason is not None
        self.metrics.sampled(clocks, now)
        return tokens, ended

    def _fails(self, request: Request, choice: Choice, position: int) -> bool:
        """Whether a request ends that got NO_TOKEN, or whose row has failed. What it still has in flight is ghosts."""
        again = not (request.alone or choice.row.failure)
        choice.once_more_at = position if again else -1
        choice.finish_reason = "error"
        if not again and not choice.row.failure:
            choice.row.failure = _without_numbers(choice.row.job, request, position)
        return not again

    def finish(self, request: Request) -> None:
        """A request's last token is committed: send it on, and its row once all choices of that are there."""
        choice = self.choices.pop(request)
        row = choice.row
        if not row.failure:
            self._send(request, choice)
        row.left -= 1
        if row.left:
            return
        del self.rows[request.index]
        if row.failure:
            self.metrics.rows_failed += 1
            self.answers.error(row.failure)
        else:
            self.metrics.rows_ok += 1
            self.answers.answer(Head.of(row.job))

    def _send(self, request: Request, choice: Choice) -> None:
        assert choice.finish_reason is not None
        self.metrics.finished(request, choice.clock, perf_counter())
        text = choice.checker.text if choice.checker else None
        finished = Finished.of(request, choice.finish_reason, choice.stop_reason, text, choice.logprobs)
        self.answers.choice(request.index, request.choice, finished)

    def close(self) -> None:
        """All rows have ended: see to it that their answers are where they belong."""
        failed = self.answers.close()
        self.metrics.rows_ok -= failed
        self.metrics.rows_failed += failed


class Packets(Protocol):
    """How a leader's packets travel: a PacketWire, or a PacketQueue where there is nobody else."""

    def post(self, packet: Packet) -> None: ...

    def receive(self) -> Packet: ...


class Judged:
    """The leader's: decides which requests have ended, and says so, and whether to stop, to all."""

    def __init__(self, leader: Leader, packets: Packets, stop: Stop, lag: int) -> None:
        """`lag`: ticks for which samples stay where they are before they are judged, unless they are asked for."""
        self.leader = leader
        self.packets = packets
        self.stop = stop
        self.lag = lag
        self.unjudged: deque[tuple[Plan, Sampled | None]] = deque()  # the latest plans
        self.last_finish = 0.0  # on perf_counter's clock; 0: none yet
        self._waited = 0.0  # for packets

    @property
    def waited(self) -> float:
        return self._waited + self.leader.waited

    def open(self, row: Job | BadRow) -> None:
        self.leader.open(row)

    def send(self, plan: Plan, sampled: Sampled | None) -> None:
        self.unjudged.append((plan, sampled))
        if len(self.unjudged) > self.lag:
            self._judge()

    def receive(self, plan: Plan) -> Packet:
        if self.unjudged and self.unjudged[0][0] is plan:
            self._judge()
        asked = perf_counter()
        packet = self.packets.receive()
        self._waited += perf_counter() - asked
        return packet

    def finish(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.leader.finish(request)
        self.leader.answers.flush()
        if requests:
            self.last_finish = perf_counter()

    def figures(self, started: float, ended: float) -> Metrics:
        metrics = self.leader.metrics
        metrics.replicas, metrics.idle_seconds = 1, ended - max(started, self.last_finish)
        return metrics

    def _judge(self) -> None:
        """Post the packet of the oldest plan that has none."""
        plan, sampled = self.unjudged.popleft()
        tokens, finished = self.leader.judge(plan, sampled) if sampled else ([], [])
        self.packets.post(Packet(tokens, finished, self.stop.asked, plan.digests))


class Followed:
    """That of all other ranks: what the leader says."""

    def __init__(self, packets: PacketWire) -> None:
        self.packets = packets
        self.waited = 0.0

    def open(self, row: Job | BadRow) -> None: ...

    def send(self, plan: Plan, sampled: Sampled | None) -> None:
        self.packets.post()

    def receive(self, plan: Plan) -> Packet:
        asked = perf_counter()
        packet = self.packets.receive()
        self.waited += perf_counter() - asked
        return packet

    def finish(self, requests: Sequence[Request]) -> None: ...

    def figures(self, started: float, ended: float) -> Metrics:
        return Metrics()


def _ends(params: SamplingParams) -> frozenset[int]:
    """Token ids that end a request."""
    return frozenset(params.stop_token_ids if params.ignore_eos else params.eos_token_ids + params.stop_token_ids)


def _without_numbers(job: Job, request: Request, position: int) -> BadRow:
    """Why a row has no answer that got NO_TOKEN at a position."""
    which = f" of choice {request.choice}" if len(job.requests) > 1 else ""
    token = position - request.prompt_len + 1
    reason = (
        f"the model's logits for this row are no numbers (NaN or infinity) at token {token}{which}, also when it is "
        f"computed alone; other rows are not affected. Are there NaNs in the checkpoint, or do numbers overflow in "
        f"model.dtype (float32 has room)?"
    )
    return BadRow(job.index, job.custom_id, reason, SERVER_ERROR, job.key, job.metadata)


def _finish_reason(request: Request, choice: Choice, token: int, position: int) -> str | None:
    """Why a request ends with the token at a position; None if it doesn't. Earlier tokens may not be committed yet."""
    if token in choice.ends:
        is_eos = token in request.params.eos_token_ids and not request.params.ignore_eos
        choice.stop_reason = None if is_eos else token
        return "stop"
    if choice.checker and (stop := choice.checker.push(token)) is not None:
        choice.stop_reason = stop
        return "stop"
    return "length" if position >= request.full_length else None
