"""Loading of models, capture of their graphs, and detection of their attention sites."""
