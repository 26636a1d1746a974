"""One rank's share of a tick: receive hidden states, run this stage's layers, send them on or sample."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from spmd.backend.kv_cache import KVCache
from spmd.parallel.feedback import TokenFeedback
from spmd.parallel.hidden import HiddenChannel
from spmd.sampling.sampler import Sampled, plain_greedy
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request
from spmd.stage.cuda_graphs import Forward
from spmd.stage.inputs import InputBuilder
from spmd.trace.host_clock import Clock
from spmd.trace.phases import Phase


class Sampling(Protocol):
    """What chooses tokens on the leader: plain PyTorch (`sampling/sampler.py`) or our kernel (`backend/cuda/`)."""

    def sample(self, logits: Tensor, requests: Sequence[Request], positions: Sequence[int]) -> Sampled:
        """Choose the token at `positions[i]` of `requests[i]` from `logits[i]`; the same on all implementations."""
        ...


class Stage:
    """`channel` is None without a pipeline, `feedback` without lookahead, `sampler` everywhere but on the leader."""

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        inputs: InputBuilder,
        channel: HiddenChannel | None,
        feedback: TokenFeedback | None,
        sampler: Sampling | None,
        clock: Clock,
    ) -> None:
        self.forward = forward
        self.cache = cache
        self.inputs = inputs
        self.channel = channel
        self.feedback = feedback
        self.sampler = sampler
        self.clock = clock

    @property
    def result_lag(self) -> int:
        """Ticks for which samples had better stay on the device: a host that asks at once waits for the forward."""
        return 1 if self.inputs.device.type == "cuda" else 0

    def run(self, plan: Plan, shared_rows: int | None = None) -> Sampled | None:
        """See `spmd.engine.Stage`. Where replicas share a forward, an empty plan runs padding, unless all are empty."""
        clock = self.clock
        if self.feedback:
            self.feedback.receive(plan)
            clock.end(Phase.FEEDBACK)
        if plan.cleared:
            self.cache.clear(plan.cleared)
        if not plan.requests and not shared_rows:
            return None
        latest = self.feedback.latest if self.feedback else None
        x, batch = self.inputs.build(plan, latest, self._decode_rows(plan, shared_rows))
        batch = replace(batch, shared_rows=shared_rows)
        rows = len(batch.positions)
        clock.end(Phase.INPUTS)
        if not self.forward.decoder.first:
            x = self._receive(x, rows)
            clock.end(Phase.HIDDEN)
        x = self.forward(x, batch)
        clock.ran(rows, plan.num_decodes + plan.num_prompt_tokens)
        sampled = None
        if self.forward.decoder.last and plan.sampled:
            sampled = self._sample(plan, x)
            clock.end(Phase.SAMPLE)
        self._send(x)
        if self.feedback and sampled:
            self.feedback.send(plan, sampled.token_ids)
        clock.end(Phase.SEND)
        return sampled

    def _decode_rows(self, plan: Plan, shared_rows: int | None) -> int:
        """Rows that the decodes take, equal on all stages.

        In lockstep at least one, and as many as any replica has if there is a graph of these and no prompt beside them.
        """
        if not shared_rows or plan.num_prompt_tokens:
            return plan.padded_decodes
        return shared_rows if shared_rows in self.forward.graphs else max(plan.padded_decodes, 1)

    def warm_up(self, prompt: int) -> None:
        """Run a prompt of padding through the pipeline: opens its connections, compiles and loads kernels."""
        ids, batch = self.inputs.padding(0, prompt)
        self._send(self.forward(self._receive(ids, prompt), batch))

    def _receive(self, ids: Tensor, rows: int) -> Tensor:
        """What the forward starts from: token ids on the first stage, else the previous one's hidden states."""
        if self.forward.decoder.first:
            return ids
        assert self.channel is not None
        return self.channel.receive(rows)

    def _send(self, x: Tensor) -> None:
        if not self.forward.decoder.last:
            assert self.channel is not None
            self.channel.send(x)

    def drain(self) -> None:
        if self.channel:
            self.channel.drain()
        if self.feedback:
            self.feedback.drain()

    @torch.inference_mode()
    def _sample(self, plan: Plan, logits: Tensor) -> Sampled | None:
        """All tensor ranks of the last stage bring their slices of the logits; the leader gets the tokens."""
        head = self.forward.decoder.lm_head
        assert head is not None
        logits = logits[: len(plan.sampled)]  # behind these are those of padding rows
        if plain_greedy(plan.sampled, plan.sample_positions):
            token_ids = head.argmax(logits)
            return Sampled(token_ids) if self.sampler else None
        whole = head.gather(logits)
        if self.sampler is None:
            return None
        assert whole is not None
        return self.sampler.sample(whole, plan.sampled, plan.sample_positions)
