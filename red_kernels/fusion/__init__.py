"""How a layer applies an edit in one pass with the operation behind it."""
