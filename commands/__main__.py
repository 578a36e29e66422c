"""`python -m fewstep.commands`, for `accelerate launch -m`."""

from fewstep.commands.cli import run_cli

if __name__ == "__main__":
    run_cli()
