"""Write pairs of noise and teacher sample for the regression loss of DMD1."""

from fewstep.commands.encode import make_pairs

if __name__ == "__main__":
    make_pairs(__doc__ or "")
