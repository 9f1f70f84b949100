"""`python -m bbprompt` is `bbprompt`."""

from bbprompt.cli import main

if __name__ == "__main__":
    main()
