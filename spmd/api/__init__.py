"""What a row may ask and what an answer looks like."""
