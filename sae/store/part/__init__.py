"""One part file: vectors as an ordinary Parquet file whose values lie raw. FORMAT.md says the same in words."""
