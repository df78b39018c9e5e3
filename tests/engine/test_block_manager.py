"""The pool against a plain model of it: who holds what, what is cached, and what goes first."""

from collections import OrderedDict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from server.engine.block_manager import BlockManager, next_key, root_key
from server.engine.request import AdapterRef, LoraSelection

BLOCK_SIZE = 2
NUM_BLOCKS = 6
ROOTS = (b"base", b"adapter")


def keys_of(root: bytes, contents: tuple[int, ...]) -> list[bytes]:
    keys: list[bytes] = []
    for token_id in contents:
        keys.append(next_key(keys[-1] if keys else root, [token_id] * BLOCK_SIZE))
    return keys


class Pool(RuleBasedStateMachine):
    """Sequences that take what is cached and fresh blocks for the rest, publish them and end."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[bytes, ...]] = {}
        """What a block holds, as the chain of keys that ends in its own."""
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(NUM_BLOCKS))
        """Unheld blocks, the next to be reused first."""

    @rule(
        target=sequences,
        root=st.sampled_from(ROOTS),
        contents=st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
    )
    def begin(self, root: bytes, contents: tuple[int, ...]) -> object:
        keys = keys_of(root, contents)
        cached = self.blocks.match(keys)
        # What is found has the wanted content, and the first that is not found is nowhere.
        for block, key in zip(cached, keys, strict=False):
            assert self.content[block][-1] == key
        if len(cached) < len(keys):
            assert not any(chain[-1] == keys[len(cached)] for chain in self.content.values())
        num_fresh = len(keys) - len(cached)
        num_taken = num_fresh + self.blocks.num_free_among(cached)
        assert self.blocks.num_free_among(cached) == sum(block in self.free for block in cached)
        if num_taken > self.blocks.num_free:
            before = dict(self.content)
            assert self.blocks.allocate(self.blocks.num_free + 1) is None
            assert self.content == before
            return multiple()
        self.blocks.share(cached)
        for block in cached:
            self.free.pop(block, None)
        fresh = self.blocks.allocate(num_fresh)
        assert fresh == list(self.free)[:num_fresh]  # the least recently used
        for block in fresh:
            del self.free[block]
            self.content.pop(block, None)
        table = cached + fresh
        assert len(set(table)) == len(table)
        self.held.append(table)
        return (table, keys)

    @rule(sequence=sequences, num_blocks=st.integers(1, 4))
    def publish(self, sequence: tuple[list[int], list[bytes]], num_blocks: int) -> None:
        table, keys = sequence
        if not any(table is other for other in self.held):
            return
        for index, block in list(enumerate(table))[:num_blocks]:
            is_known = any(chain[-1] == keys[index] for chain in self.content.values())
            self.blocks.publish(block, keys[index])
            if block not in self.content and not is_known:
                self.content[block] = tuple(keys[: index + 1])

    @rule(sequence=consumes(sequences))
    def end(self, sequence: tuple[list[int], list[bytes]]) -> None:
        table, _ = sequence
        self.held = [other for other in self.held if other is not table]
        self.blocks.release(table)
        for block in reversed(table):
            if not any(block in other for other in self.held):
                self.free[block] = None
                self.free.move_to_end(block, last=block in self.content)

    @invariant()
    def no_block_is_held_and_free(self) -> None:
        held = {block for table in self.held for block in table}
        assert held.isdisjoint(self.free)
        assert len(held) + len(self.free) == NUM_BLOCKS
        assert self.blocks.num_free == len(self.free)
        for block in range(NUM_BLOCKS):
            num_holders = sum(block in table for table in self.held)
            assert self.blocks._ref_counts[block] == num_holders
            assert self.blocks.num_free_among([block]) == (num_holders == 0)

    @invariant()
    def cached_keys_lead_to_their_content(self) -> None:
        for block, chain in self.content.items():
            found = self.blocks.match(list(chain))
            if len(found) == len(chain):  # else a block before it has gone
                assert found[-1] == block

    def teardown(self) -> None:
        for table in self.held:
            self.blocks.release(table)
        assert self.blocks.num_free == NUM_BLOCKS
        fresh = self.blocks.allocate(NUM_BLOCKS)
        assert fresh is not None
        assert sorted(fresh) == list(range(NUM_BLOCKS))
        assert all(self.blocks.match([chain[-1]]) == [] for chain in self.content.values())


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def publish_all(blocks: BlockManager, table: list[int], keys: list[bytes]) -> None:
    for block, key in zip(table, keys, strict=True):
        blocks.publish(block, key)


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    keys = keys_of(b"root", (1, 2, 3))
    table = blocks.allocate(3)
    assert table is not None
    publish_all(blocks, table, keys)
    blocks.release(table)
    assert len(blocks.match(keys)) == 3
    blocks.allocate(2)  # the one that was never used, then the prefix's last
    assert blocks.match(keys) == table[:2]


def test_a_block_without_content_goes_before_any_with() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    table = blocks.allocate(2)
    assert table is not None
    (key,) = keys_of(b"root", (1,))
    blocks.publish(table[0], key)
    blocks.release(table[:1])
    blocks.release(table[1:])
    assert blocks.allocate(1) == table[1:]
    assert blocks.match([key]) == table[:1]


def test_a_prefix_that_is_taken_again_is_young_again() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    (old,), (new,) = keys_of(b"root", (1,)), keys_of(b"root", (2,))
    table = blocks.allocate(2)
    assert table is not None
    publish_all(blocks, table, [old, new])
    blocks.release(table[:1])
    blocks.release(table[1:])
    blocks.share(table[:1])
    blocks.release(table[:1])
    blocks.allocate(1)
    assert blocks.match([old]) == table[:1]
    assert blocks.match([new]) == []


def test_a_block_in_use_stays_shared_until_its_last_holder_goes() -> None:
    blocks = BlockManager(1, BLOCK_SIZE)
    table = blocks.allocate(1)
    assert table is not None
    blocks.share(table)
    blocks.release(table)
    assert (blocks.num_free, blocks.allocate(1)) == (0, None)
    blocks.release(table)
    assert blocks.num_free == 1


def test_a_second_copy_of_a_content_stays_private() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    first, second = blocks.allocate(1), blocks.allocate(1)
    assert first is not None
    assert second is not None
    (key,) = keys_of(b"root", (1,))
    blocks.publish(first[0], key)
    blocks.publish(second[0], key)
    assert blocks.match([key]) == first
    blocks.release(first)
    blocks.release(second)
    assert blocks.allocate(1) == second
    assert blocks.match([key]) == first


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(2, BLOCK_SIZE, prefix_caching=False)
    table = blocks.allocate(1)
    assert table is not None
    (key,) = keys_of(b"root", (1,))
    blocks.publish(table[0], key)
    assert blocks.match([key]) == []


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_blocks_are_counted_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockManager(1, BLOCK_SIZE).num_blocks_for(num_tokens) == num_blocks


def test_a_key_depends_on_all_before_it_and_on_where_tokens_end() -> None:
    assert keys_of(b"a", (1, 2))[1] != keys_of(b"b", (1, 2))[1]
    assert keys_of(b"a", (1, 2))[1] != keys_of(b"a", (3, 2))[1]
    assert keys_of(b"a", (1, 2))[1] == keys_of(b"a", (1, 2))[1]
    assert next_key(b"a", [1, 256]) != next_key(b"a", [256, 1])
    assert next_key(b"a", [1]) != next_key(b"a", [1, 0])
    assert next_key(b"a", [2**20]) != next_key(b"a", [2**20 + 2**32])


def select(digest: str | None, depth: int, *, max_depth: int = 4, uid: int = 1) -> LoraSelection:
    adapter = None
    if digest is not None:
        adapter = AdapterRef("name", uid, digest, 4, max_depth, 0, "path")
    return LoraSelection(adapter, depth, 4, "request")


def test_the_root_is_the_model_that_a_selection_means() -> None:
    base = root_key("r", select(None, 0))
    assert root_key("r", select("d", 0)) == base
    assert root_key("s", select(None, 0)) != base
    distinct = [select(digest, depth) for digest in "de" for depth in (1, 2, 4)]
    assert len({root_key("r", lora) for lora in distinct} | {base}) == 7
    # Above the adapter's deepest layer nothing changes; nor does another reading of the same.
    shallow = [select("d", depth, max_depth=2, uid=depth) for depth in (2, 3, 4)]
    assert len({root_key("r", lora) for lora in shallow}) == 1
    assert root_key("r", shallow[0]) == root_key("r", select("d", 2))
