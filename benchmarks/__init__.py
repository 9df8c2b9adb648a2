"""Paired measurements and their committed tables."""
