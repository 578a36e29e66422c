"""Write a page of one training run, or of several beside each other: curves, samples, settings, what the runs said."""

from fewstep.commands.report_runs import report_runs

if __name__ == "__main__":
    report_runs(__doc__ or "")
