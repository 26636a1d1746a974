"""The mathematics of a model's stage, its shape and its checkpoint; `backend` is the port to whoever computes it."""
