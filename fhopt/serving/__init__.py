"""Plans in vLLM: the plugin, cache layout in the engine's blocks, and attention on them.

plugin        entry point of the group vllm.general_plugins; registers everything else
versions      supported vLLM versions, and the hooks that the plugin needs
quantization  quant_method "fhopt" of config.json: verifies a rewritten folder and sets up the caches of its layers
refusals      models, plans and engine options that are rejected, each with one message
backend       attention backend, its metadata, and the two additional caches of a layer
block_groups  how the engine counts, allocates and frees the blocks of these caches
block_sizes   tokens per block of each cache
rows          bytes of a token in a block: packed latents, residual window, attention sinks and means
batch         token layout of one vLLM batch
compiled_step decode step of a layer as one native call, on CPUs
device_step   decode step of a layer in Triton kernels, on GPUs
decode_step   decode step of a layer in torch operations, as a fallback
layer_cache   cache writes and attention of one layer

Only plugin, quantization, backend and block_groups import vLLM.
"""
