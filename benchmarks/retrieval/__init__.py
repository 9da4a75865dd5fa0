"""Page selection and the retrieval LM head."""
