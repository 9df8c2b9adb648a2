"""What `shardrun ablate` is made of: the ideas as a table, arms and suites, runs and their results file, effects."""
