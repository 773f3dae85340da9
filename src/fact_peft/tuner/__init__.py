"""What PEFT calls: the configuration, the shared factors, the layers, and the tuner that puts them into a model."""
