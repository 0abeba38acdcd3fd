"""What a model takes on accelerators, before there are any: memory, arithmetic and time, from shapes alone."""
