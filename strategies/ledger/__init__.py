"""The books: what every rank holds and sends."""
