import random
from array import array

from spmd.journal.key_table import KeyTable, pack


def test_a_table_knows_its_keys_and_nothing_else() -> None:
    rng = random.Random(1)
    keys = [0, 2**64 - 1, *(rng.getrandbits(64) for _ in range(500))]
    table = KeyTable(pack(array("Q", keys + keys[:100])))
    assert len(table) == len(set(keys)) and table.num_set == 0
    assert all(table.set(key, number) for number, key in enumerate(keys))
    assert [table.values[table.find(key)] for key in keys] == list(range(len(keys)))
    assert table.set(keys[3], 7) and table.num_set == len(keys)
    assert not table.set(5, 1) and table.find(5) == table.find(None) == -1


def test_no_keys() -> None:
    table = KeyTable(pack(array("Q")))
    assert len(table) == 0 and not table.set(1, 1)


def test_a_key_takes_16_bytes_and_travels_in_8() -> None:
    packed = pack(array("Q", range(1000)))
    assert len(packed) == 8000
    table = KeyTable(packed)
    assert len(table.keys.tobytes()) + len(table.values.tobytes()) == 16000
