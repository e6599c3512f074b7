"""Whole training steps: time, memory and trainable parameters of every method, and their growth."""
