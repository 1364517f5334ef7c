"""The evidence: comparisons, tables and figures from result files."""
