"""Rewritten folders and exported decode steps: pt2, MLIR, kernel libraries, MLA checkpoints."""
