"""One rank's share of a tick: receive hidden states, run this stage's layers, send them on or sample."""

from time import perf_counter

from spmd.model.decoder import Decoder
from spmd.model.inputs import InputBuilder
from spmd.model.kv_cache import KVCache
from spmd.model.sampler import Sampled, Sampler
from spmd.parallel.hidden import HiddenChannel
from spmd.schedule.plan import Plan


class Stage:
    """`channel` is None without a pipeline, `sampler` everywhere but on the leader."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        inputs: InputBuilder,
        channel: HiddenChannel | None,
        sampler: Sampler | None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.inputs = inputs
        self.channel = channel
        self.sampler = sampler
        self.busy_s = 0.0  # seconds spent computing, waiting for hidden states not counted

    def run(self, plan: Plan) -> Sampled | None:
        """Run a plan; on the leader returns a token for each of `plan.sampled`, None if there are none."""
        if not plan.requests:
            return None
        hidden, batch = self.inputs.build(plan)
        if not self.decoder.first:
            assert self.channel is not None
            hidden = self.channel.receive(plan.num_rows)
        started = perf_counter()
        output = self.decoder(hidden, batch, self.cache)
        sampled = self.sampler.sample(output, plan.sampled) if self.sampler and plan.sampled else None
        self.busy_s += perf_counter() - started
        if not self.decoder.last:
            assert self.channel is not None
            self.channel.send(output)
        return sampled
