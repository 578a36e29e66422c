"""Write the figures and tables of README and docs anew, from the records in assets/benchmarks."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when a document is behind its records"
    )
    options = parser.parse_args()

    from studies.documents import documents, updated

    behind = []
    for path in documents(ROOT):
        text = path.read_text(encoding="utf-8")
        try:
            fresh = updated(ROOT, text)
        except ValueError as error:
            sys.exit(f"error: {path.relative_to(ROOT)}: {error}")
        if fresh != text:
            behind.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(fresh, encoding="utf-8")
    print("\n".join(behind) if behind else "all documents agree with their records")
    if options.check and behind:
        sys.exit(1)


if __name__ == "__main__":
    main()
