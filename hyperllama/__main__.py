"""`python -m hyperllama`."""

from hyperllama.cli import main

if __name__ == "__main__":
    main()
