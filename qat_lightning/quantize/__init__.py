"""`prepare` and `convert`, and everything that describes, selects, stores and checks what they make."""
