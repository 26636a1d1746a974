"""The way back on the device: sampled tokens from the leader to the first stage, where they are inputs again.

Only with lookahead: plans are then made, and run, before their input tokens have reached the host.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd.parallel.transfer import to_device
from spmd.schedule.plan import Plan
from spmd.topology import Topology


class TokenFeedback:
    """`latest` is int64 [max_num_seqs + 1]: the last token of each seat, then 0 for padding. True on the first stage.

    All are in the vocabulary: where a row got NO_TOKEN stands 0, which feeds ghosts.

    One broadcast for each plan that samples. The leader starts it when it has sampled, the others join just before the
    plan of N ticks later, the first that may need the tokens. No rank's host waits for a GPU.
    """

    def __init__(
        self, topology: Topology, group: ProcessGroup | None, max_num_seqs: int, slots: int, device: torch.device
    ) -> None:
        """`group`: the first stage's ranks and the leader, None if these are one. `slots`: N."""
        self.topology = topology
        self.group = group
        self.slots = slots
        self.latest = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._awaited: deque[Plan] = deque()
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()
        if group is not None:
            # NCCL's first call makes the hosts wait for each other. In the loop that would be a deadlock: the others
            # join N ticks later, and before that they need packets that a waiting leader would not send.
            dist.broadcast(self.latest, topology.leader, group=group)

    def receive(self, plan: Plan) -> None:
        """To be called with each tick's plan before its inputs are built: takes in the tokens of N ticks ago."""
        if self.topology.is_leader or not self.topology.is_first_stage:
            return
        self._awaited.append(plan)
        if len(self._awaited) > self.slots and (earlier := self._awaited.popleft()).sampled:
            tokens = torch.empty_like(self.latest)
            dist.broadcast(tokens, self.topology.leader, group=self.group)
            self._place(earlier, tokens)

    def send(self, plan: Plan, token_ids: Tensor) -> None:
        """On the leader: pass on the tokens, int64 [S], of `plan.sampled`, of which there is at least one."""
        if self.topology.is_first_stage:
            self._place(plan, token_ids)
        if self.group is None:
            return
        tokens = torch.zeros_like(self.latest)
        tokens[: len(token_ids)] = token_ids
        work = dist.broadcast(tokens, self.topology.leader, group=self.group, async_op=True)
        assert work is not None
        self._sending.append((work, tokens))
        while len(self._sending) > self.slots:
            self._sending.popleft()[0].wait()

    def drain(self) -> None:
        """Wait until everything has left; a run that stops early leaves tokens on their way, which must be met."""
        for plan in self._awaited:
            if plan.sampled:
                dist.broadcast(torch.empty_like(self.latest), self.topology.leader, group=self.group)
        while self._sending:
            self._sending.popleft()[0].wait()

    def _place(self, plan: Plan, tokens: Tensor) -> None:
        """A request keeps its seat as long as it is in flight, so it sits where it sat when the plan was made."""
        seats = to_device([request.seat for request in plan.sampled], torch.int64, self.latest.device)
        self.latest.index_copy_(0, seats, tokens[: len(seats)].clamp_min(0))
