"""Adapter files."""
