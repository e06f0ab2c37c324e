"""The store by hand: what a root holds, whether it is whole, what is garbage, and a snapshot for other tools."""
