"""Merging edits into the weights of a model, and writing it as a model of transformers."""
