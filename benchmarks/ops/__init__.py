"""The operations, each by every implementation that a user could take instead, over inputs of real models' sizes.

``operations`` says what is computed, ``implementations`` who computes it, ``inputs`` on what, ``clocks`` how it is
timed; ``job`` runs the cases.
"""
