"""Autoregressive video students."""
