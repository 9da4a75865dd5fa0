"""The latent KV cache: layers, residual window, packed latents, byte reports."""
