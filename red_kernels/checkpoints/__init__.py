"""Files of edits: this package's own, the RED authors', PEFT's; and the vectors of a model put into them."""
