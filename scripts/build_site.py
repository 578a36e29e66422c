"""Build the documentation as a site: README, docs, and a reference of all public names. Every link must hold.

make docs, or python scripts/build_site.py --output build/site; then open build/site/index.html.
Needs the extra [docs]: pip install -e '.[docs]'.
"""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="build/site", help="folder of the pages; default: build/site")
    parser.add_argument("--module", nargs="*", help="of the reference, such as fewstep.core.paths; default: all")
    options = parser.parse_args()

    from studies.site import build_site

    try:
        pages = build_site(options.output, modules=options.module)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}/index.html: {pages} pages")


if __name__ == "__main__":
    main()
