"""``python -m eos_utils``: the same as ``eos``, where the package is not installed."""

from eos_utils.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
