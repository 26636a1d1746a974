"""What is done and never lost: the files of an output."""
