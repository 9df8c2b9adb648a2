"""The lessons: folders NN_name, found by their number, and what their checks and demos share.

The folders are no packages (a module's name cannot start with a digit): their files are loaded by path. `shardrun
lesson` runs them; README.md says how one is made.
"""
