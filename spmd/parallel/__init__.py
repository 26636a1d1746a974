"""What travels between ranks: process groups, hidden states, token packets."""
