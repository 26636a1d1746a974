"""The compact form in which a row travels from its builder to the ranks of its replica."""

import pickle
from array import array

from spmd.api.endpoints import BY_URL
from spmd.api.rows import BadRow, Job
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request


def pack(row: Job | BadRow) -> bytes:
    """Each prompt stands in it once, however many choices it has, four bytes a token."""
    if isinstance(row, BadRow):
        return pickle.dumps(row)
    params = [request.params for request in row.requests]
    return pickle.dumps(
        (
            row.index,
            row.custom_id,
            row.endpoint.url,
            [prompt.tokens.tobytes() for prompt in row.prompts],
            params,
            row.requests[0].priority,
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
    index, custom_id, url, packed_prompts, params, priority, return_token_ids, key, metadata = row
    prompts = [Prompt(array("i", ids)) for ids in packed_prompts]
    n = len(params) // len(prompts)
    requests = [Request(index, choice, prompts[choice // n], each, priority) for choice, each in enumerate(params)]
    return Job(index, custom_id, BY_URL[url], requests, prompts, return_token_ids, key, metadata)
