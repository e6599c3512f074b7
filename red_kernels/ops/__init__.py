"""The public operations, their checks and their gradients."""
