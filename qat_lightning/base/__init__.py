"""What every other package stands on: errors, whole files, random state, the schedule, facts on the CPU."""
