"""The command line: a thin file per verb. Imports everything, imported by nothing."""
