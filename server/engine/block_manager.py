"""KV blocks: who holds which, and which can be shared because their content is the same.

A block's content is named by a key that chains over everything it depends on: base revision, adapter
content, effective depth, and every token up to its end. Equal keys, equal keys and values. A block
that nobody holds keeps its content until it is needed for something else, least recently used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Tokens
from hashlib import blake2b

from server.engine.request import LoraSelection

_KEY_BYTES = 16


def root_key(base_revision: str, lora: LoraSelection) -> bytes:
    """What the first block of a prompt depends on beside its tokens.

    Depth 0 is the base model whatever the adapter, and shares its blocks.
    """
    depth = lora.effective_depth
    digest = lora.adapter.digest if lora.adapter is not None and depth > 0 else "base"
    text = f"{base_revision}\0{digest}\0{depth}"
    return blake2b(text.encode(), digest_size=_KEY_BYTES).digest()


def next_key(parent: bytes, token_ids: Tokens[int]) -> bytes:
    """The key of a full block of `token_ids` that follows the block named `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


class BlockManager:
    """A pool of `num_blocks` physical blocks, counted by reference."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._ref_counts = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached content or not."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, keys: Tokens[bytes]) -> list[int]:
        """The longest run of blocks, from the first, whose content is cached. Nothing is taken."""
        found: list[int] = []
        if self.prefix_caching:
            for key in keys:
                block = self._cached.get(key)
                if block is None:
                    break
                found.append(block)
        return found

    def num_free_among(self, blocks: Tokens[int]) -> int:
        """How many of these nobody holds: taking them uses up that much of `num_free`."""
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def share(self, blocks: Tokens[int]) -> None:
        """Hold blocks that `match` found."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hold fresh blocks, dropping cached content where it must; None when too few are free."""
        if num_blocks > len(self._free):
            return None
        blocks = []
        for _ in range(num_blocks):
            block, _ = self._free.popitem(last=False)
            key = self._keys[block]
            if key is not None:
                del self._cached[key]
                self._keys[block] = None
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Say that a held block now has the whole content named `key`. A second copy stays private."""
        if self.prefix_caching and self._keys[block] is None and key not in self._cached:
            self._keys[block] = key
            self._cached[key] = block

    def forget(self, blocks: Tokens[int]) -> None:
        """Find these blocks' content no more; who holds them keeps them."""
        for block in blocks:
            key = self._keys[block]
            if key is not None:
                del self._cached[key]
                self._keys[block] = None

    def release(self, blocks: Tokens[int]) -> None:
        """Let go of a sequence's blocks. Its last ones are reused first: prefixes are worth most."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
