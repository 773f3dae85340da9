"""A classifier that others can use: base model, model card, saving, loading, pushing."""
