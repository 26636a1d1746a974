import pytest

from spmd.schedule.blocks import NULL_BLOCK, BlockPool, hash_block, hash_blocks


def chain(*blocks: list[int]) -> list[bytes]:
    hashes = [b""]
    for tokens in blocks:
        hashes.append(hash_block(hashes[-1], tokens))
    return hashes[1:]


def test_every_block_but_the_null_block_can_be_taken_once() -> None:
    pool = BlockPool(5, 4, caching=True)
    taken = [pool.pop() for _ in range(pool.num_free)]
    assert sorted(taken) == [1, 2, 3, 4]
    assert NULL_BLOCK not in taken
    pool.check([taken])
    pool.release(taken)
    pool.check([])


def test_hash_covers_the_whole_prefix() -> None:
    assert chain([1, 2], [3, 4])[1] != chain([1, 9], [3, 4])[1]
    assert chain([1, 2], [3, 4]) == chain([1, 2], [3, 4])
    for tokens in ([1, 2, 3, 4], [1, 2, 3, 4, 5]):
        assert hash_blocks(tokens, 2) == chain([1, 2], [3, 4])
    assert hash_blocks([1], 2) == []


def test_freed_blocks_are_found_until_they_are_reused() -> None:
    pool = BlockPool(4, 2, caching=True)
    hashes = chain([1, 2], [3, 4])
    held = [pool.pop(), pool.pop()]
    for block, digest in zip(held, hashes, strict=True):
        pool.register(block, digest)
    pool.release(held)
    assert pool.find(hashes) == held
    assert pool.find(chain([1, 2], [9, 9])) == held[:1]
    for _ in range(2):  # the never used block first, then the end of the chain
        pool.pop()
    assert pool.find(hashes) == held[:1]


def test_least_recently_freed_is_reused_first() -> None:
    pool = BlockPool(4, 1, caching=True)
    hashes = [hash_block(b"", [token]) for token in range(3)]
    blocks = [pool.pop() for _ in range(3)]
    for block, digest in zip(blocks, hashes, strict=True):
        pool.register(block, digest)
    for index in (1, 0, 2):
        pool.release([blocks[index]])
    pool.share(pool.find(hashes[1:2]))  # touched: 0 is now the oldest
    assert pool.pop() == blocks[0]
    assert pool.pop() == blocks[2]


def test_shared_block_survives_one_holder() -> None:
    pool = BlockPool(3, 2, caching=True)
    block = pool.pop()
    (digest,) = chain([1, 2])
    pool.register(block, digest)
    pool.share([block])
    pool.release([block])
    pool.check([[block]])
    assert pool.num_free == 1


def test_check_sees_a_leak() -> None:
    pool = BlockPool(3, 2, caching=True)
    pool.pop()
    with pytest.raises(AssertionError):
        pool.check([])


def test_blocks_of_a_spoilt_request_are_found_by_nobody_and_cleared_when_nobody_holds_them() -> None:
    pool = BlockPool(5, 2, caching=True)
    hashes = chain([1, 2], [3, 4])
    held = [pool.pop(), pool.pop()]
    for block, digest in zip(held, hashes, strict=True):
        pool.register(block, digest)
    pool.share(held[:1])
    pool.release(held, spoilt=True)
    assert pool.find(hashes) == []
    assert pool.take_unclean() == held[1:] and pool.take_unclean() == []
    pool.check([held[:1]])
    clean = pool.pop(clean=True)
    assert pool.take_unclean() == [clean]
