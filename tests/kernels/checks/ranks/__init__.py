"""Checks that need several processes."""
