"""The life of a Lightning run with int8 training in it: what the callbacks ask, say and do."""
