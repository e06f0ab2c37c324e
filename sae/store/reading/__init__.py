"""Rows to arrays and batches: row groups checked against their hashes, in the shuffled order."""
