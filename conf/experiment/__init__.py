"""Complete runs: values for several groups and fields at once."""
