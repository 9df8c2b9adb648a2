"""The command line: a file or folder per verb. Lessons and benchmarks import it; the trainer never does."""
