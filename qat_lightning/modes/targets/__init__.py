"""What each backend computes in int8: one table for each kind of backend."""
