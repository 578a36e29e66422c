"""A page of training runs: `fewstep report`, and what scripts/report_runs.py starts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def _options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="[NAME=]DIR", help="run directory; several are compared")
    add("--output", help="folder of runs.html; None: report in the run directory, for one run")
    return parser.parse_args()


def report_runs(about: str = "") -> None:
    """Write the page, and end the process."""
    options = _options(about)
    if options.output is None and len(options.run) > 1:
        sys.exit("error: give --output FOLDER for the page of several runs")
    from fewstep.evaluation.provenance import collect_provenance, program_name
    from fewstep.evaluation.runs.page import write_run_page
    from fewstep.evaluation.runs.read import read_run
    from fewstep.evaluation.systems import named_place

    try:
        places = [named_place(text) for text in options.run]
        runs = [read_run(place, name=name) for name, place in places]
        made = collect_provenance(program_name(), arguments=sys.argv[1:])
        page = write_run_page(options.output or Path(places[0][1]) / "report", runs, made)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(page)
