"""Export: rewritten folders, decode steps as pt2 or MLIR, kernel libraries, checkpoints for serving engines."""
