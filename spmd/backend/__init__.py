"""Who computes: implementations of the port `spmd.model.backend`."""
