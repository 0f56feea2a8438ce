"""`python -m pipeline` is `smaller-student`, from this checkout."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
