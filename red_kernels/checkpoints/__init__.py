"""Files of edits: this package's own, the RED authors', PEFT's; and loading their vectors into a model."""
