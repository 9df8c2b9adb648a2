"""A strategy that is not the project's: data parallelism at its plainest, every gradient all-reduced by itself.

test_catalogue.py copies this folder into a copy of `strategies` and adds a line to its catalogue; nothing else.
"""
