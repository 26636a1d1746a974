"""One stage of the network: decoder, attention, KV cache, checkpoint, inputs, sampler."""
