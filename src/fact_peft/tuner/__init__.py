"""The tuner that PEFT calls: shared factors, adapted layers and heads, mixed batches, and the model class."""
