"""CPU benchmarks of attention, decode steps and cache memory."""
