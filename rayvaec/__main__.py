"""`python -m rayvaec` is the command `rayvaec`."""

from rayvaec.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
