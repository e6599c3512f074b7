"""The mechanism by which a layer applies an edit together with what follows it."""
