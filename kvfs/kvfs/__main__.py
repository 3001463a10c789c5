"""``python -m kvfs`` is the command ``kvfs``."""

from kvfs.cli import main

if __name__ == "__main__":
    main()
