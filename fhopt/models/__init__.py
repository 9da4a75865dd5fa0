"""Loading of models, capture of their graphs, search for their attention sites."""
