"""What attention does with a KV cache of latents: views of it, exact tokens, pages, the interface of transformers."""
