"""The compact form in which a row travels from its builder to the ranks of its replica."""

import pickle
from array import array
from functools import lru_cache

from spmd.api.endpoints import BY_URL
from spmd.api.rows import BadRow, Job
from spmd.schedule.blocks import HASH_BYTES
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams


def pack(row: Job | BadRow) -> bytes:
    """Each prompt stands in it once, however many choices it has, four bytes a token."""
    if isinstance(row, BadRow):
        return pickle.dumps(row)
    requests = row.requests
    choices = len(requests) // len(row.prompts)
    return pickle.dumps(
        (
            row.index,
            row.custom_id,
            row.endpoint.url,
            [(prompt.tokens.tobytes(), b"".join(prompt.hashes)) for prompt in row.prompts],
            [pickle.dumps(request.params) for request in requests[::choices]],
            [request.stream for request in requests],
            requests[0].priority,
            row.return_token_ids,
            row.key,
            row.metadata,
        )
    )


def unpack(packed: bytes) -> Job | BadRow:
    """What was packed, with requests of its own."""
    row = pickle.loads(packed)
    if isinstance(row, BadRow):
        return row
    index, custom_id, url, packed_prompts, packed_params, streams, priority, return_token_ids, key, metadata = row
    prompts = [_prompt(*packed_prompt) for packed_prompt in packed_prompts]
    params = [*map(_params, packed_params)]
    choices = len(streams) // len(prompts)
    requests = [
        Request(index, choice, prompts[choice // choices], params[choice // choices], priority, stream)
        for choice, stream in enumerate(streams)
    ]
    return Job(index, custom_id, BY_URL[url], requests, prompts, return_token_ids, key, metadata)


def _prompt(tokens: bytes, hashes: bytes) -> Prompt:
    prompt = Prompt(array("i", tokens))
    prompt.hashes = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
    return prompt


@lru_cache(maxsize=256)  # rows of one file mostly ask for the same
def _params(packed: bytes) -> SamplingParams:
    params: SamplingParams = pickle.loads(packed)
    return params
