"""Other methods of KV-cache compression, implemented from their papers."""
