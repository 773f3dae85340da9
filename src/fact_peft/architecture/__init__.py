"""What there is to adapt in a model, found by structure: linear layers, blocks, heads and their labels."""
