"""A plan inside vLLM: the plugin, what it keeps in the engine's blocks, and attention on them.

plugin        the entry point of the group vllm.general_plugins: registers everything else
versions      the versions of vLLM that are supported, and the hooks that the plugin needs of them
quantization  quant_method "fhopt" of config.json: checks a rewritten folder, gives its layers their caches
refusals      models, plans and options of the engine that are refused, each with one sentence
backend       attention backend, its metadata, and the two further caches of a layer
block_groups  how the engine counts and frees the blocks of these caches
block_sizes   how many tokens a block of each cache has
rows          bytes of a token in a block: packed latents, residual window, attention sinks and means
batch         one batch of the engine: which tokens stand where, and which are read as what
compiled_step writing and attention of the sequences that have one new token, in one call of machine code, on CPUs
device_step   the same by Triton kernels, on GPUs
decode_step   their attention on torch operations, where nothing can be compiled
layer_cache   writing and attention of one layer, on blocks

Only plugin, quantization, backend and block_groups import vLLM.
"""
