"""`python -m hugging_nano_gpt`: the command line, which is a package of its own; `torchrun -m` starts it like this."""

from hugging_nano_gpt_cli import main

if __name__ == "__main__":
    main()
