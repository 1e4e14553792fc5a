"""Structured removal: smaller dense models, by what the traced program couples."""
