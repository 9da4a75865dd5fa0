"""Long runs: correctness and memory of caches over many operations."""
