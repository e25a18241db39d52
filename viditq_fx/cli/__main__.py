"""`python -m viditq_fx.cli`: the command line where the `viditq` script is not on the path."""

from viditq_fx.cli import main

if __name__ == "__main__":
    main()
