"""fhopt: find attention in any PyTorch graph, put a compressed latent in place of keys and values, prove what it cost."""

__version__ = "0.1.0"
