"""Similarity-gated block caching: when do the blocks run, and when is their earlier work reused."""

from dit_accel.cache.block_cache import BlockCache as BlockCache
