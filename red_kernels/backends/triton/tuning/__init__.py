"""The search for launch rules on the device at hand: `red-kernels bench --tune`.

``workloads`` says what is run, ``candidates`` which tiles are tried, ``search`` which tile wins, ``matmul`` where the
fused matmul does; ``job`` is the command. How times are taken is in :mod:`red_kernels.support.clocks`.
"""
