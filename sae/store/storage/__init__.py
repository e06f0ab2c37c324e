"""The bytes of a root: local folders and S3, whole files and ranges of them."""
