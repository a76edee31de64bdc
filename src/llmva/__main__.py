"""`python -m llmva`, the same as `llmva`."""

from llmva.cli import main

if __name__ == "__main__":
    main()
