"""Many parts as one: which are finished, their layouts side by side, and the lists that training pins."""
