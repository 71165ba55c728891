"""Similarity-gated block caching: when do the blocks run, and when is their earlier work reused."""

from dit_accel.cache.block_cache import BlockCache as BlockCache
from dit_accel.cache.ranking import Ranking as Ranking
from dit_accel.cache.schedule import Schedule as Schedule
from dit_accel.cache.scope import Scope as Scope
from dit_accel.cache.signal import Signal as Signal
