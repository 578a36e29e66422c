"""Continuous-time consistency and flow-map students."""
