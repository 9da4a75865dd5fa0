"""Models on several devices and in several processes: collectives, tensor parallelism, device maps, offloading."""
