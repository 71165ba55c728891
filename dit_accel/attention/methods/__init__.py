"""Rules of block-sparse attention from the literature, one file each: published numbers, and how blocks are judged."""
