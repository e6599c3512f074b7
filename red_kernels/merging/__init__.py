"""Edits merged into the weights of a model, and written as a model of transformers."""
