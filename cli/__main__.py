"""`python -m dsg.cli`, for torchrun, which starts modules."""

from dsg.cli.main import main

if __name__ == "__main__":
    main()
