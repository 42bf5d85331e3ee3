"""`python -m evenkeel`."""

from evenkeel.cli.main import main

if __name__ == "__main__":
    main()
