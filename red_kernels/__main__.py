"""`python -m red_kernels` is the command `red-kernels`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
