"""Other methods of KV-cache compression, implemented after their papers."""
