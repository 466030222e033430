"""``python -m deepzero`` is the command ``deepzero``."""

from .cli import main

if __name__ == "__main__":
    main()
