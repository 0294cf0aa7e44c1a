"""`python -m taskzip`: the command line, where the script `taskzip` is not on the path."""

from taskzip.cli import main

if __name__ == "__main__":
    main()
