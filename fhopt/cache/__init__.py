"""The KV cache of latents: layers, the residual window, packed latents, reports of bytes."""
