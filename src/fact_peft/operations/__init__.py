"""What one does with a finished adapter: exchange it in place, export it as a LoRA, look at it."""
