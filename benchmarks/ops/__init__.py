"""The operations, by every alternative implementation, on inputs of real models' sizes.

``operations`` defines them, ``implementations`` computes them, ``inputs`` has the data, ``timing`` the clocks; ``job``
runs the cases.
"""
