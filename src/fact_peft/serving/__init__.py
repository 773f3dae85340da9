"""Many adapters on one frozen model, for inference."""
