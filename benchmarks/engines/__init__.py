"""Speed and memory of fhopt and of other inference engines on a CPU."""
