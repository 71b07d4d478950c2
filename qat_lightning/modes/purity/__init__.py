"""Keeps a network as it is while it is recorded: copies its structure, and refuses side effects."""
