"""The search for launch rules on this device: `red-kernels bench --tune`.

``workloads`` has the measured calls, ``candidates`` the tried tiles, ``search`` the choice of a tile, ``matmul`` the
wins of the fused matmul; ``job`` is the command. Clocks are in :mod:`red_kernels.support.clocks`.
"""
