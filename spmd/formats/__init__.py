"""From inputs and to outputs as people have them: what isn't one plain file of JSON lines."""
