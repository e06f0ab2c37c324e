"""What the vectors were read on: contexts, rows joined with them, and what extraction left out."""
