"""Benchmarks: quality against cost beside the rivals (`curves`), and what wrapping costs (`overhead`)."""
