"""What ends a run that can't go on, and says why."""
