"""Attention on a latent KV cache: cache views, exact tokens, packed latents, pages, and the model interface."""
