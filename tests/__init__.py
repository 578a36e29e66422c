"""Tests. A package, because torch-fidelity installs another top-level package of this name."""
