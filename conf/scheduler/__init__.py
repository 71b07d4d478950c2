"""Learning-rate schedules, stepped after every epoch."""
