"""The compiled libraries are put here by setup.py."""
