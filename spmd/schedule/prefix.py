"""The blocks that a request shares with others: which known ones its tokens begin with, and which others may share."""

from spmd.schedule.blocks import BlockPool, hash_block
from spmd.schedule.request import Request


def known_prefix(request: Request, pool: BlockPool) -> list[int]:
    """Cached blocks of the request's tokens; never all of them, since the last token's logits must be computed."""
    if not pool.caching or request.alone:
        return []
    most = (request.num_tokens - 1) // pool.block_size
    return pool.find(block_hash(request, index, pool.block_size) for index in range(most))


def register(request: Request, pool: BlockPool) -> None:
    """Let others share the blocks that are full by now.

    The content will be there in time: every stage runs plans in order, and writes a plan's keys and values before it
    reads them.
    """
    full = request.num_known // pool.block_size
    if pool.caching and full > request.num_registered:
        for index in range(request.num_registered, full):
            pool.register(request.blocks[index], block_hash(request, index, pool.block_size))
        request.num_registered = full


def block_hash(request: Request, index: int, size: int) -> bytes:
    """Content hash of a full block of a request, whose blocks are asked for in order.

    Each is computed once, those that hold nothing but prompt once for all choices of that.
    """
    shared = request.prompt_len // size
    hashes, at = (request.prompt.hashes, index) if index < shared else (request.hashes, index - shared)
    if at == len(hashes):
        parent = block_hash(request, index - 1, size) if index else b""
        hashes.append(hash_block(parent, request.tokens(index * size, (index + 1) * size)))
    return hashes[at]
