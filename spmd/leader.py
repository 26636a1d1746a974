"""What only the leader of a replica does: decide when a request ends, put its answer together, keep the clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from spmd.io.answers import Completion, answer_line, complete, error_line
from spmd.io.rows import BadRow, Job
from spmd.io.tokenizing import StopChecker
from spmd.model.sampler import Sampled
from spmd.report.metrics import Metrics
from spmd.schedule.request import Request, TokenLogprobs


@dataclass(slots=True)
class Open:
    """A row that isn't answered yet; one entry of each list for each of its choices."""

    job: Job
    checkers: list[StopChecker | None]
    logprobs: list[list[TokenLogprobs]]
    stop_reasons: list[int | str | None]
    completions: dict[int, Completion] = field(default_factory=dict)


class Leader:
    def __init__(
        self, tokenizer: Any, model: str, metrics: Metrics, write: Callable[[int, str, int | None], None] | None = None
    ) -> None:
        """`write(index, line, key)` takes answers, and errors with key None; None throws all away (a benchmark)."""
        self.tokenizer = tokenizer
        self.model = model
        self.metrics = metrics
        self.write = write
        self.rows: dict[int, Open] = {}

    def take(self, row: Job | BadRow) -> None:
        """A row came in: open it, or write down at once why it can't be answered."""
        if isinstance(row, BadRow):
            self.metrics.rows_failed += 1
            if self.write:
                self.write(row.index, error_line(row), None)
            return
        now = perf_counter()
        for request in row.requests:
            self.metrics.arrived(request, now)
        n = len(row.requests)
        self.rows[row.index] = Open(row, [self._checker(r) for r in row.requests], [[] for _ in range(n)], [None] * n)

    def judge(self, requests: Sequence[Request], sampled: Sampled) -> tuple[list[int], list[bool]]:
        """The sampled token of each request, and whether it is the request's last."""
        tokens = sampled.token_ids.tolist()
        now = perf_counter()
        for place, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            self.metrics.token(request, now)
            if sampled.logprobs and (logprobs := sampled.logprobs[place]):
                self.rows[request.index].logprobs[request.choice].append(logprobs)
            request.finish_reason = self._finish_reason(request, token)
        return tokens, [request.finish_reason is not None for request in requests]

    def finish(self, request: Request) -> None:
        """A request's last token is committed; write the row's answer once all its choices are there."""
        row = self.rows[request.index]
        self.metrics.finished(request, perf_counter())
        if self.write:
            row.completions[request.choice] = self._completion(row, request)
            if len(row.completions) < len(row.job.requests):
                return
            choices = [row.completions[choice] for choice in range(len(row.completions))]
            self.write(request.index, answer_line(row.job, choices, self.model, self.tokenizer), row.job.key)
        del self.rows[request.index]
        self.metrics.rows_ok += 1

    def _finish_reason(self, request: Request, token: int) -> str | None:
        params, row = request.params, self.rows[request.index]
        if token in params.eos_token_ids and not params.ignore_eos:
            return "stop"
        if token in params.stop_token_ids:
            row.stop_reasons[request.choice] = token
            return "stop"
        checker = row.checkers[request.choice]
        if checker and (stop := checker.push(token)) is not None:
            row.stop_reasons[request.choice] = stop
            return "stop"
        return "length" if request.num_output + 1 >= params.max_tokens else None

    def _completion(self, row: Open, request: Request) -> Completion:
        assert request.finish_reason is not None
        checker = row.checkers[request.choice]
        return complete(
            self.tokenizer,
            request,
            request.finish_reason,
            row.stop_reasons[request.choice],
            checker.text if checker else None,
            row.logprobs[request.choice] if request.params.logprobs is not None else None,
        )

    def _checker(self, request: Request) -> StopChecker | None:
        params = request.params
        if not params.stop:
            return None
        return StopChecker(
            self.tokenizer,
            request.tokens,
            params.stop,
            params.include_stop_str_in_output,
            params.skip_special_tokens,
            params.min_tokens,
        )
