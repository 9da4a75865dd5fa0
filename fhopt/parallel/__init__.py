"""Models on several devices and processes: collectives, tensor parallelism, device maps, offloading."""
