"""What attention does with a KV cache of latents: views of it, exact tokens, pages, and how a model gets at them."""
