"""The public operations, their checks and their gradients."""

from . import recorded as recorded  # the C++ nodes take the recorded backward from here
