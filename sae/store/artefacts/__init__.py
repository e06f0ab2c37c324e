"""What exists: commit records and the files they vouch for; checkpoints of what is still being made."""
