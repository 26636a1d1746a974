"""Before the work: from the command line to ranks that agree, and the exit status."""
