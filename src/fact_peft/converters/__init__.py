"""Checkpoints of other implementations of FacT as adapters, exactly."""
