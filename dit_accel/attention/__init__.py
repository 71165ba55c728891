"""Block-sparse attention: which key blocks does a query block see, and the way into a model's attention."""

from dit_accel.attention.block_sparse import BlockSparse as BlockSparse
