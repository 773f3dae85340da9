"""What one does with an adapter: start, train, replace, inspect and export it."""
