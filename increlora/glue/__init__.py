"""The benchmark: from a configuration to the result file of a run on GLUE."""
