"""The public operations, their checks and their gradients."""

from . import recorded as recorded  # which tells the nodes in C++ of the backward in Python
